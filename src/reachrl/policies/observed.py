"""Checks of the arguments of `Policy.predict`, and their conversion to an observation of one row."""

import math
from collections.abc import Collection, Mapping

import numpy as np

from reachrl.config.evaluation import MEAN, Temperature
from reachrl.errors import ConfigError
from reachrl.types import Observation


def one_observation(
    images: np.ndarray | Mapping[str, np.ndarray],
    instruction: str,
    state: np.ndarray | None,
    *,
    num_cameras: int = 1,
    state_size: int | None = None,
) -> Observation:
    """Convert one frame (or one per camera), instruction and state to a batch of one.

    Args:
        images: a frame u8[H W 3], or a dict with the frame of each camera, in the policy's order.
        instruction: the task in words.
        state: f32[S], for a policy that takes one.
        num_cameras: that the policy reads.
        state_size: `S`; None: the policy takes no state.

    Raises:
        ConfigError: an argument has another type, shape or range.
    """
    if not isinstance(instruction, str) or not instruction.strip():
        raise ConfigError(f"instruction = {instruction!r}: expected the task in words, such as 'open the drawer'")
    given = {str(name): image for name, image in images.items()} if isinstance(images, Mapping) else None
    if len(given or {"camera": images}) != num_cameras or given == {}:
        named = ", ".join(given or {}) or "none" if given is not None else "a single frame"
        one, more = "give one frame", f"give a dict with the {num_cameras} frames in the policy's order"
        raise ConfigError(
            f"images: this policy sees {'one camera' if num_cameras == 1 else f'{num_cameras} cameras'}, given are "
            f"{len(given) if given is not None else 1} ({named}); {one if num_cameras == 1 else more}"
        )
    frames = (
        {"camera": _frame("images", images)}
        if given is None
        else {name: _frame(f"images[{name!r}]", image) for name, image in given.items()}
    )
    return Observation(images=frames, instructions=(instruction,), state=_state(state, state_size))


def check_temperature(temperature: Temperature, *, has_mean: bool, samples: int = 1) -> None:
    """Check the temperature that a policy is to act at, and of how many samples the mean is taken.

    Raises:
        ConfigError: it is negative or not finite, or `mean` for a policy whose tokens are no bins of a number; or
            there are several samples without noise, or less than one.
    """
    if not isinstance(samples, int) or samples < 1 or (samples > 1 and temperature in (0, MEAN)):
        raise ConfigError(
            f"samples = {samples!r} at temperature {temperature}: expected 1, or a larger whole number with a "
            "temperature above 0, as samples without noise are all the same"
        )
    if temperature == MEAN:
        if not has_mean:
            raise ConfigError(
                "temperature mean: this policy chooses among tokens that are not bins of one number each, so they have "
                "no mean; use 0 (greedy) or a temperature above it"
            )
        return
    number = isinstance(temperature, int | float | np.number) and not isinstance(temperature, bool)
    if not (number and math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature = {temperature!r}: expected 0 (greedy), a finite number above it, or 'mean'")


def _state(state: np.ndarray | None, size: int | None) -> np.ndarray | None:
    if size is None:
        if state is not None:
            raise ConfigError("state: this policy takes frames and an instruction only; leave state out")
        return None
    found = None if state is None else np.asarray(state)
    if found is None or found.shape != (size,) or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        what = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
        raise ConfigError(f"state: this policy takes {size} finite numbers of the robot, f32[{size}]; given is {what}")
    return found.astype(np.float32)[None]


def _frame(what: str, image: object) -> np.ndarray:
    """Check a frame and add the batch axis: u8[1 H W 3]."""
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
    return frame[None]


def _remedy(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[0] == 1:
        return "; take images[0]"
    if len(shape) == 3 and shape[0] == 3:
        return "; the channels come last: transpose(1, 2, 0)"
    if len(shape) == 3 and shape[-1] == 4:
        return "; leave the fourth channel out: [..., :3]"
    return ""


def check_shown(
    name: str, num_cameras: int, state_size: int | None, cameras: Collection[str], shown_size: int | None
) -> None:
    """Check that a source of observations has the cameras and the state that a policy reads.

    Args:
        name: what the policy is called.
        num_cameras: cameras that it reads.
        state_size: numbers of the state that it reads; None: it reads none.
        cameras: names of the source's cameras.
        shown_size: numbers of the source's state; None: it has none.

    Raises:
        ConfigError: what is missing.
    """
    if len(cameras) < num_cameras:
        raise ConfigError(
            f"{name} looks at {num_cameras} cameras, and there {'is' if len(cameras) == 1 else 'are'} "
            f"{len(cameras)} ({', '.join(cameras)}): name as many in env.cameras, in the policy's order"
        )
    if state_size is not None and state_size != shown_size:
        there = "no state" if shown_size is None else f"a state of {shown_size} numbers"
        raise ConfigError(
            f"{name} takes a state of {state_size} numbers, and there is {there}: choose an environment (or "
            "demonstrations) that shows what the policy was made for"
        )
