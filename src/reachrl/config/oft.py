"""Options of OpenVLA-OFT with its token head: the chunk, the cameras, the state, and which program's sequence it is."""

from typing import Annotated, Literal

from pydantic import Field

from reachrl.config.marks import Affects
from reachrl.config.policy import PrismaticConfig


class OpenVLAOFTConfig(PrismaticConfig):
    """OpenVLA-OFT: a chunk of actions in one pass with attention in both directions.

    No file of a checkpoint states `chunk_size`, `dialect`, `num_cameras`, `state_size` or `statistics`: they are those
    of the program that trained it.
    """

    kind: Literal["openvla_oft"] = "openvla_oft"  # pyright: ignore[reportIncompatibleVariableOverride]
    chunk_size: Annotated[int, Affects.ARCHITECTURE] = Field(default=8, gt=0)
    """Actions of an answer: 8 in the LIBERO checkpoints, 25 in ALOHA's, 5 in Bridge's."""
    dialect: Annotated[Literal["official", "simplevla_rl", "rlinf"], Affects.ARCHITECTURE] = "simplevla_rl"
    """The program whose sequence it is. `official` and `simplevla_rl` close it with `</s>`, `rlinf` (its
    `implement_version: rlinf`) leaves that out. `official` chooses tokens from the whole vocabulary, as its evaluation
    does (one that stands for no action decodes to the nearest bin); the others from the 256 action tokens."""
    num_cameras: Annotated[int, Affects.ARCHITECTURE] = Field(default=1, ge=1, le=3)
    """Cameras it looks at, the first ones of `env.cameras`: the scene, then the wrist (`num_images_in_input`)."""
    state_size: Annotated[int | None, Affects.ARCHITECTURE] = Field(default=None, gt=0)
    """Numbers of the robot's state that become a token of the sequence (8 in LIBERO, 14 in ALOHA); unset: none."""
    statistics: Annotated[Literal["quantiles", "bounds"], Affects.WARM_START] = "quantiles"
    """What an official checkpoint maps to [-1, 1]: between the 1 % and 99 % quantiles (LIBERO, Bridge), or between
    minimum and maximum (ALOHA)."""

    @property
    def stop(self) -> bool:
        """Whether `</s>` closes the sequence."""
        return self.dialect != "rlinf"

    @property
    def all_tokens(self) -> bool:
        """Whether an action token is chosen from the whole vocabulary, not from the 256 action tokens."""
        return self.dialect == "official"

    @property
    def num_actions(self) -> int:
        """Actions of an answer."""
        return self.chunk_size
