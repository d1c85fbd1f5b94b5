"""Where a two-finger gripper can take hold of a thing from above."""

from dataclasses import dataclass

import numpy as np

# The Panda hand in its own frame at the grip site, metres; the fingers close along the first axis.
FINGER_REACH = 0.037  # from the middle to the inside of an open finger, with a little air
_FINGER_DEPTH = 0.029  # of a finger outwards from there
_FINGER_HALF_WIDTH = 0.012
_TIP_BELOW = 0.010  # of the finger tips under the grip site
PALM_ABOVE = 0.032  # the palm's underside over the grip site
_PALM_HALF = (0.035, 0.105)  # across and along the closing direction
_PAD = (0.008, 0.010)  # half height and half width of what a finger pad touches
_TABLE_AIR = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Grasp:
    """The grip site's position in metres f64[3], and the direction in which the fingers close, rad in [0, pi)."""

    position: np.ndarray
    yaw: float


def find_grasps(thing: np.ndarray, others: np.ndarray, support_height: float, yaw_now: float) -> list[Grasp]:
    """All ways to take hold of `thing`, the best first.

    A good one is deep, near the middle of the thing, and needs little turning. A bowl cannot be taken at its middle,
    so its rim is what remains.

    Args:
        thing: points on its surface f64[P 3].
        others: points on everything else that the hand must not touch f64[Q 3].
        support_height: of what the thing stands on, metres.
        yaw_now: of the hand, rad.
    """
    top, bottom = thing[:, 2].max(), max(thing[:, 2].min(), support_height)
    middle = 0.5 * (thing[:, :2].max(0) + thing[:, :2].min(0))
    near = np.linalg.norm(others[:, :2] - middle, axis=1) < 0.3
    others = others[near & (others[:, 2] > bottom - 0.005)]
    found: list[tuple[float, Grasp]] = []
    deepest = bottom + _TIP_BELOW + _TABLE_AIR
    heights = sorted({max(deepest, top - depth) for depth in (0.045, 0.03, 0.02, 0.012)})
    for height in heights:
        for yaw in np.arange(12) * np.pi / 12:
            for position, gap in _at(thing, others, height, yaw):
                turn = abs((yaw - yaw_now + np.pi / 2) % np.pi - np.pi / 2)
                off = float(np.linalg.norm(position - middle))
                cost = 4.0 * off + 0.02 * turn + 1.0 * max(0.0, height - heights[0]) + 1.0 * gap
                found.append((cost, Grasp(position=np.array([*position, height]), yaw=float(yaw))))
    return [grasp for _, grasp in sorted(found, key=lambda item: item[0])]


def _at(thing: np.ndarray, others: np.ndarray, height: float, yaw: float) -> list[tuple[np.ndarray, float]]:
    """Positions f64[2] at one height and yaw, each with the thickness between the fingers."""
    turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])  # along and across the closing direction
    own = np.column_stack([thing[:, :2] @ turn.T, thing[:, 2] - height])
    all_points = np.concatenate([own, np.column_stack([others[:, :2] @ turn.T, others[:, 2] - height])])
    touched = own[np.abs(own[:, 2]) < _PAD[0] + 0.004]
    if not len(touched):
        return []
    fingers = all_points[(all_points[:, 2] > -_TIP_BELOW) & (all_points[:, 2] < PALM_ABOVE + 0.02)]
    palm = all_points[all_points[:, 2] > PALM_ABOVE]
    found: list[tuple[np.ndarray, float]] = []
    for across in np.arange(touched[:, 1].min(), touched[:, 1].max() + 1e-9, 0.004):
        strip = touched[np.abs(touched[:, 1] - across) < _PAD[1]]
        if len(strip) < 3:
            continue
        beside = fingers[np.abs(fingers[:, 1] - across) < _FINGER_HALF_WIDTH][:, 0]
        above = palm[np.abs(palm[:, 1] - across) < _PALM_HALF[0]][:, 0]
        for low, high in _pieces(np.sort(strip[:, 0])):
            along = 0.5 * (low + high)
            if high - low > 2 * FINGER_REACH:
                continue
            distance = np.abs(beside - along)
            blocked = ((distance > FINGER_REACH) & (distance < FINGER_REACH + _FINGER_DEPTH)).any()
            if blocked or (np.abs(above - along) < _PALM_HALF[1]).any():
                continue
            found.append((turn.T @ np.array([along, across]), high - low))
    return found


def _pieces(sorted_points: np.ndarray) -> list[tuple[float, float]]:
    """Where a line through a thing is inside it: intervals without a gap that a finger would fit into."""
    cuts = np.flatnonzero(np.diff(sorted_points) > _FINGER_DEPTH + 0.004)
    starts = np.concatenate([[0], cuts + 1])
    ends = np.concatenate([cuts, [len(sorted_points) - 1]])
    pieces = [(float(sorted_points[a]), float(sorted_points[b])) for a, b in zip(starts, ends, strict=True)]
    whole = (float(sorted_points[0]), float(sorted_points[-1]))
    return [*pieces, whole] if len(pieces) > 1 else pieces
