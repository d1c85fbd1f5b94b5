"""Options of the environments: which tasks, how long an episode, how many workers."""

from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from reachrl.config.base import Section
from reachrl.config.marks import Affects
from reachrl.config.metaworld_rewordings import REWORDINGS
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.config.paraphrases import spoken
from reachrl.config.perturbations import (
    CAMERA,
    COLOUR,
    GENERAL_AXES,
    LIGHT,
    START,
    TEXTURE,
    Axis,
    RandomiseSection,
)
from reachrl.errors import ConfigError
from reachrl.streams import Stream
from reachrl.types import Start

# Training starts keep their distance from this many evaluation starts whatever `num_eval_starts` says, so
# that evaluating on more starts later never meets one that was trained on.
EVAL_POOL = 100


MetaworldCamera = Literal["corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV"]


class EnvSection(Section):
    """What every simulator needs to know."""

    packages: ClassVar[tuple[str, ...]] = ("metaworld", "mujoco", "gymnasium")
    """Distributions whose versions decide what an episode is."""

    axes: ClassVar[Mapping[str, Axis]] = GENERAL_AXES
    """How episodes can be perturbed: what every environment can, and what this one does itself where a start's
    `variant` asks for it."""

    suites: ClassVar[tuple[str, ...]] = ()
    """Published robustness suites whose tasks a start's `variant` may name, see `PublishedTask`."""

    action_dim: ClassVar[int | None] = None
    """Numbers of an action, where all environments of this section have as many; the policy's are compared with it at
    once."""

    kind: Annotated[str, Affects.EPISODE]
    """Which environment: a built-in name or `package.module:Class`."""

    tasks: Annotated[tuple[str, ...], Affects.EPISODE] = Field(min_length=1)
    """The tasks to practise and to be tested on."""

    image_size: Annotated[int, Affects.EPISODE] = Field(default=96, ge=8, le=1024)
    """Side of the square camera frames, in pixels."""

    max_steps: Annotated[int, Affects.EPISODE] = Field(default=30, ge=1)
    """Control steps (actions carried out) per episode; reaching it truncates the episode."""

    execute: Annotated[int | None, Affects.REWARD_MODEL | Affects.TRAINING | Affects.PROTOCOL] = Field(
        default=None, ge=1
    )
    """Actions of the policy's chunk that are carried out before it is asked again; the rest of the chunk is dropped.
    None: all of them (one, of a policy that answers with one). A chunk stops where the episode ends."""

    num_envs: Annotated[int, Affects.TRAINING] = Field(default=16, ge=1)
    """Environments stepped side by side, one process each, or as many as cores where a kind lets them share."""

    render_device: Annotated[str, Affects.DATA | Affects.TRAINING | Affects.EVALUATION | Affects.FUTURE] = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
    )
    """Where frames are drawn: `cpu`; `cuda`, the visible GPUs in turn; `cuda:1`; `auto` is `cuda` where there is a GPU.
    What cannot be is drawn on the CPU, with a warning."""

    worker_timeout_s: Annotated[float, Affects.SPEED] = Field(default=60.0, gt=0)
    """A worker that has not answered for this long is killed and replaced. Above 120 it also lengthens the time that
    environments may take to be made."""

    num_train_starts: Annotated[int, Affects.DATA | Affects.TRAINING] = Field(default=200, ge=1)
    """Numbered start states per task that demonstrations, the reward model and training may use."""

    num_eval_starts: Annotated[int, Affects.EVALUATION] = Field(default=50, ge=1, le=EVAL_POOL)
    """Numbered start states per task kept for evaluation only."""

    randomise: Annotated[RandomiseSection, Affects.TRAINING] = RandomiseSection()
    """Perturbed episodes in online training."""

    def varied(self, start: Start, seed: int, number: int) -> Start:
        """The start of the training episode with this number, perturbed where `randomise` says so."""
        return self.randomise.varied(start, self.axes, seed, Stream.RANDOMISE_TRAINING, number)

    def rewordings(self, task: str) -> tuple[str, ...]:
        """Two other sentences that describe `task`, the first for evaluation and the second for training; or none."""
        return ()

    def spoken(self, sentence: str, start: Start) -> str:
        """What the policy is told in an episode of a task that `sentence` describes."""
        return spoken(sentence, start, self.rewordings(start.task))

    @model_validator(mode="after")
    def _axes_exist(self) -> Self:
        self.randomise.check("env.randomise", self.axes, self.kind)
        return self

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return named_once("env.tasks", tasks)


def named_once(key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a name that comes twice."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        more = f" and {len(twice) - 5} others" if len(twice) > 5 else ""
        raise ConfigError(f"{key} names {', '.join(map(repr, twice[:5]))}{more} more than once; name each once")
    return names


class MetaworldConfig(EnvSection):
    """Meta-World: a Sawyer arm, 50 table-top tasks, MuJoCo physics, assets inside the package."""

    action_dim: ClassVar[int | None] = 4
    axes: ClassVar[Mapping[str, Axis]] = {
        "camera": CAMERA,
        "light": LIGHT,
        "colour": COLOUR,
        "texture": TEXTURE,
        **GENERAL_AXES,
        "start": START,
    }

    kind: Literal["metaworld"] = "metaworld"  # pyright: ignore[reportIncompatibleVariableOverride]

    tasks: tuple[str, ...] = Field(
        default=(
            "button-press-topdown",
            "door-close",
            "drawer-close",
            "drawer-open",
            "faucet-close",
            "faucet-open",
            "window-close",
            "window-open",
        ),
        min_length=1,
    )

    cameras: Annotated[tuple[MetaworldCamera, ...], Affects.EPISODE] = Field(default=("corner2",), min_length=1)
    """What films the scene; the first is what policies and reward models with a single eye look at."""

    action_repeat: Annotated[int, Affects.EPISODE] = Field(default=5, ge=1, le=50)
    """Simulator steps (12.5 ms each) for which one decision is held."""

    mesh_faces: Annotated[int, Affects.EPISODE] = Field(default=200, ge=0)
    """Visual meshes are simplified to about this many faces when a scene is built; 0 leaves them alone.
    Meshes that take part in collisions keep their shape, so physics does not change."""

    def rewordings(self, task: str) -> tuple[str, ...]:
        """Two other sentences that describe `task`."""
        return REWORDINGS[task]

    @field_validator("cameras")
    @classmethod
    def _no_camera_twice(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        return named_once("env.cameras", cameras)

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in INSTRUCTIONS:
                close = get_close_matches(task[:100].removesuffix("-v3"), INSTRUCTIONS, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`reachrl list` shows all 50"
                raise ConfigError(f"env.tasks: Meta-World has no task {task[:100]!r}; {hint}")
        return tasks
