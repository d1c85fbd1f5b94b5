"""The model-ready rows of OpenVLA-OFT: those of OpenVLA, of one or several cameras, and the robot's state."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reachrl.policies.openvla.inputs import OpenVLAInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OFTInputs(OpenVLAInputs):
    """`pixel_values` hold the cameras one after the other on the channels, `vision_features` on the patches."""

    state: Float[Tensor, "B S"] | None = None  # normalised to [-1, 1]
