"""What a user's own loop sees, checked and made an observation of one row."""

import math
from collections.abc import Mapping

import numpy as np

from reachrl.errors import ConfigError
from reachrl.types import Observation


def one_observation(
    images: np.ndarray | Mapping[str, np.ndarray], instruction: str, state: np.ndarray | None
) -> Observation:
    """One moment as a batch of one.

    Args:
        images: a frame u8[H W 3], or a dict with the frame of the one camera.
        instruction: the task in words.
        state: must be None: no policy takes one yet.

    Raises:
        ConfigError: an argument has another type, shape or range.
    """
    if state is not None:
        raise ConfigError(
            "state: this policy takes frames and an instruction only, no state of the robot; leave it out"
        )
    if not isinstance(instruction, str) or not instruction.strip():
        raise ConfigError(f"instruction = {instruction!r}: expected the task in words, such as 'open the drawer'")
    if isinstance(images, Mapping):
        if len(images) != 1:
            named = ", ".join(map(str, images)) or "none"
            raise ConfigError(f"images: this policy sees one camera, given are {len(images)} ({named}); give one frame")
        ((name, image),) = images.items()
        return _row(f"images[{name!r}]", image, instruction)
    return _row("images", images, instruction)


def check_temperature(temperature: float) -> None:
    """Refuse what is no temperature.

    Raises:
        ConfigError: it is negative or not finite.
    """
    if not (isinstance(temperature, int | float | np.number) and math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature = {temperature!r}: expected 0 (greedy) or a finite number above it")


def _row(what: str, image: np.ndarray, instruction: str) -> Observation:
    frame = np.array(image)  # a copy: frames of Pillow cannot be written, and PyTorch warns of those
    if frame.dtype != np.uint8:
        kind = "0..1, multiply by 255 and round" if np.issubdtype(frame.dtype, np.floating) else "0..255, convert it"
        raise ConfigError(f"{what}: dtype {frame.dtype}, expected uint8 with RGB in 0..255 (if its numbers are {kind})")
    if frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
        raise ConfigError(f"{what}: shape {list(frame.shape)}, expected one RGB frame [H, W, 3]{_remedy(frame.shape)}")
    if frame.max() == 1:
        raise ConfigError(
            f"{what}: no number exceeds 1, expected RGB in 0..255: the frame looks like one in 0..1 that was converted "
            "to uint8 without being multiplied by 255"
        )
    return Observation(images=frame[None], instructions=(instruction,))


def _remedy(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[0] == 1:
        return "; take images[0]"
    if len(shape) == 3 and shape[0] == 3:
        return "; the channels come last: transpose(1, 2, 0)"
    if len(shape) == 3 and shape[-1] == 4:
        return "; leave the fourth channel out: [..., :3]"
    return ""
