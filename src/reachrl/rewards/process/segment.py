"""Cuts a trajectory at gripper changes and finds the keyframes where the arm comes to rest."""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from reachrl.errors import ExtensionError

_STILL = 1e-6  # metres per decision: below this even the fastest motion is numerical noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """Milestones of one trajectory, as frame numbers.

    `bounds` runs from frame 0 to the last frame; segment `i` covers `bounds[i]..bounds[i + 1]`.
    """

    bounds: Int64[np.ndarray, "S+1"]
    keyframes: Int64[np.ndarray, "K"]


def segment(
    ee_state: Float[np.ndarray, "T+1 4"],
    *,
    success: bool,
    gripper_change: float,
    min_segment: int,
    keyframe_speed: float,
    name: str = "trajectory",
) -> Segmentation:
    """Cut one trajectory into segments and find its keyframes.

    A trajectory of one frame has one empty segment; one whose gripper never changes by `gripper_change`
    has one segment. The last frame of a successful trajectory is always a keyframe.

    Args:
        ee_state: end-effector x y z in metres and gripper opening 0..1, one row a frame.
        success: whether the trajectory reached its goal.
        gripper_change: smallest significant change of opening.
        min_segment: frames a gripper state must last.
        keyframe_speed: fraction of the trajectory's fast motion below which the arm is at rest.
        name: how an error calls this trajectory.

    Raises:
        ExtensionError: a pose is not finite, or the array is not `[T+1 4]`.

    Source: arXiv 2505.18719, section on the robotic process reward model.
    """
    if ee_state.ndim != 2 or ee_state.shape[1] != 4 or len(ee_state) == 0:
        raise ExtensionError(
            f"{name}: ee_state has shape {ee_state.shape}, expected [frames 4] with at least one frame; "
            "the environment must return x y z and gripper opening for every step."
        )
    bad = np.flatnonzero(~np.isfinite(ee_state).all(axis=1))
    if len(bad):
        raise ExtensionError(
            f"{name}: ee_state is not finite at frame {bad[0]} ({len(bad)} of {len(ee_state)} frames); "
            "expected a pose for every frame. Drop this trajectory and collect it again, or repair the environment."
        )
    last = len(ee_state) - 1
    cuts = gripper_cuts(ee_state[:, 3], gripper_change=gripper_change, min_segment=min_segment)
    # A gripper that changes in the last frame only would open a segment without a single decision.
    bounds = np.array([0, *cuts[cuts < last], last], dtype=np.int64)
    keyframes = rest_frames(ee_state[:, :3], bounds, keyframe_speed=keyframe_speed)
    if success:
        keyframes = np.union1d(keyframes, [last]).astype(np.int64)
    return Segmentation(bounds=bounds, keyframes=keyframes)


def gripper_cuts(
    opening: Float[np.ndarray, "T+1"], *, gripper_change: float, min_segment: int
) -> Int64[np.ndarray, "C"]:
    """Frames at which the gripper has changed between open and closed.

    Two thresholds 20 % of the trajectory's own range apart decide open or closed, so that noise around one
    of them does not flip the state; a state shorter than `min_segment` frames is chatter and is absorbed.
    Where the median openings of two neighbouring states are less than `gripper_change` apart, there was no
    change either: the range of a noisy measurement or of a slow drift is wider than any step in it.

    Args:
        opening: gripper opening 0..1 of every frame.
        gripper_change: smallest step from one state's median opening to the next one's.
        min_segment: frames a state must last, also at both ends.

    Returns:
        First frame of each new state, ascending.
    """
    low, high = float(opening.min()), float(opening.max())
    if high - low < gripper_change:
        return np.empty(0, dtype=np.int64)
    closes, opens = low + 0.4 * (high - low), low + 0.6 * (high - low)
    is_open = np.empty(len(opening), dtype=bool)
    state = bool(opening[0] > 0.5 * (low + high))
    for frame, value in enumerate(opening.tolist()):
        state = value > closes if state else value >= opens
        is_open[frame] = state
    starts = np.concatenate([[0], np.flatnonzero(is_open[1:] != is_open[:-1]) + 1, [len(opening)]])
    lasting = [start for start, stop in itertools.pairwise(starts) if stop - start >= min_segment]
    # The first lasting state also owns the chatter before it; a state that returns after chatter is no change.
    cuts = [b for a, b in itertools.pairwise(lasting) if is_open[a] != is_open[b]]
    return np.array(_drop_small_steps(opening, cuts, gripper_change), dtype=np.int64)


def _drop_small_steps(opening: Float[np.ndarray, "T+1"], cuts: list[int], gripper_change: float) -> list[int]:
    """The cuts that part states whose median openings are `gripper_change` apart; the smallest steps go first."""
    if not cuts:
        return cuts
    bounds = [0, *cuts, len(opening)]
    levels = [float(np.median(opening[a:b])) for a, b in itertools.pairwise(bounds)]
    while len(levels) > 1:
        steps = np.abs(np.diff(levels))
        smallest = int(np.argmin(steps))
        if steps[smallest] >= gripper_change:
            break
        del bounds[smallest + 1]
        first, last = bounds[smallest : smallest + 2]
        levels[smallest : smallest + 2] = [float(np.median(opening[first:last]))]
    return bounds[1:-1]


def rest_frames(
    xyz: Float[np.ndarray, "T+1 3"], bounds: Int64[np.ndarray, "S+1"], *, keyframe_speed: float
) -> Int64[np.ndarray, "K"]:
    """Frames at which the end effector, having moved, comes to rest inside a segment.

    Each stretch slower than `arm_speed` calls rest gives one frame, that of lowest speed; a stretch that opens a
    segment gives none, because no motion of that segment led to it.

    Args:
        xyz: end-effector position of every frame.
        bounds: first frame of each segment, then the last frame.
        keyframe_speed: fraction of the fast speed that counts as rest.
    """
    speed, rest = arm_speed(xyz, keyframe_speed=keyframe_speed)
    keyframes: list[int] = []
    for first, last in itertools.pairwise(bounds.tolist()):
        inside = speed[first:last]
        slow = np.concatenate([[False], inside < rest, [False]])
        edges = np.flatnonzero(slow[1:] != slow[:-1]).reshape(-1, 2)
        keyframes += [first + a + int(np.argmin(inside[a:b])) + 1 for a, b in edges.tolist() if a > 0]
    return np.array(keyframes, dtype=np.int64)


def arm_speed(xyz: Float[np.ndarray, "T+1 3"], *, keyframe_speed: float) -> tuple[Float[np.ndarray, "T"], float]:
    """The speed that led to each frame but the first, and the one below which the arm is at rest.

    Speed is measured against the trajectory's own fast motion (its 95th percentile), so the unit of length
    and the time between decisions cancel. Velocities are not needed: speed is the way between two poses, and a
    pose that did not arrive in mid-motion is bridged.

    Args:
        xyz: end-effector position of every frame.
        keyframe_speed: fraction of the fast speed that counts as rest.

    Returns:
        The speed of each decision, and that of rest; 0 for an arm that never moves, so that nothing is below it.
    """
    speed = _speed(xyz)
    fast = _fast(speed)
    if fast < _STILL:
        return speed, 0.0
    missed = _missed_poses(speed, slow=keyframe_speed * fast)
    if len(missed):
        xyz = xyz.copy()
        xyz[missed] = 0.5 * (xyz[missed - 1] + xyz[missed + 1])
        speed = _speed(xyz)
        fast = _fast(speed)
    return speed, keyframe_speed * fast


def _speed(xyz: Float[np.ndarray, "T+1 3"]) -> Float[np.ndarray, "T"]:
    """The way, in the unit of `xyz`, that led to each frame but the first."""
    return np.linalg.norm(np.diff(xyz, axis=0), axis=1)


def _fast(speed: Float[np.ndarray, "T"]) -> float:
    """The speed of fast motion; the fastest twentieth may be glitches."""
    return float(np.percentile(speed, 95)) if len(speed) else 0.0


def _missed_poses(speed: Float[np.ndarray, "T"], *, slow: float) -> Int64[np.ndarray, "M"]:
    """Frames whose pose did not arrive, so that they repeat the one before.

    An arm under way never repeats a position to the last bit and goes on at once. Where one frame does, between
    two fast ones, the robot reported its pose more rarely than it was photographed, and the arm did not rest.
    """
    return np.flatnonzero((speed[1:-1] == 0) & (speed[:-2] >= slow) & (speed[2:] >= slow)) + 2
