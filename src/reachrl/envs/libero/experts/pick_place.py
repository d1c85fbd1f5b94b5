"""Taking a thing and putting it somewhere."""

import numpy as np

from reachrl.envs.libero.experts.grasp import PALM_ABOVE, find_grasps
from reachrl.envs.libero.experts.hand import Actions, Hand
from reachrl.envs.libero.experts.scene import Scene

_UP = np.array([0.0, 0.0, 1.0])
_APPROACH_M = 0.06  # over the grasp, from where the hand goes straight down
_LIFTED_M = 0.02
_OVER_OBSTACLES_M = 0.03
_ROOF_M = 0.01  # sideways from a point of a thing to one over it that is in the way when it is lifted
_DISH_M = 0.014  # of the grip site over the bottom of a dish
_THERE_M = 0.015  # from where a dragged thing shall be
_DRAGS = 40  # short moves with one
_TRIES = 3


class NotDone(Exception):
    """A skill did not reach what it is for."""


def pick(scene: Scene, hand: Hand, thing: str) -> Actions:
    """Take hold of `thing` and lift it a little.

    Raises:
        NotDone: it cannot be grasped from above, or slipped every time.
    """
    for attempt in range(_TRIES):
        points = scene.points(thing)
        support = max(scene.table_height(), points[:, 2].min())
        grasps = find_grasps(points, scene.others(thing), support, hand.yaw)
        if not grasps:
            raise NotDone(f"no grasp found for {thing}")
        grasp = grasps[min(attempt * 7, len(grasps) - 1)]  # the next ones differ by millimetres
        rotation = hand.pointing_down(grasp.yaw)
        above = grasp.position + _APPROACH_M * _UP
        before = scene.origin(thing)[2]
        yield from travel(scene, hand, above, rotation)
        yield from hand.go(grasp.position, rotation, near=0.004, limit=40, slow=0.6)
        yield from hand.close()
        yield from _leave_roof(scene, hand, thing, rotation)
        yield from hand.go(hand.position + _APPROACH_M * _UP, rotation, near=0.015, limit=25)
        if scene.origin(thing)[2] > before + _LIFTED_M:
            return
        yield from hand.open()
        yield from hand.go(hand.position + _APPROACH_M * _UP, rotation, near=0.02, limit=20)
    raise NotDone(f"{thing} slipped {_TRIES} times")


def drag(scene: Scene, hand: Hand, thing: str, target: str) -> Actions:
    """Bring a dish to `target` along the table, with closed fingers against the inside of its rim.

    Raises:
        NotDone: it did not follow.
    """
    rotation = hand.pointing_down(hand.yaw)
    yield from hand.close()
    inside = scene.points(thing).mean(0)
    yield from travel(scene, hand, inside + _APPROACH_M * _UP, rotation)
    inside[2] = scene.points(thing)[:, 2].min() + _DISH_M
    yield from hand.go(inside, rotation, near=0.006, limit=40, slow=0.5)
    for _ in range(_DRAGS):
        way = scene.target(target)[:2] - scene.origin(thing)[:2]
        if np.linalg.norm(way) < _THERE_M:
            break
        ahead = hand.position + np.array([*(way * min(1.0, 0.06 / float(np.linalg.norm(way)))), 0.0])
        yield from hand.go(np.array([*ahead[:2], inside[2]]), rotation, near=0.005, limit=4, slow=0.5)
    else:
        raise NotDone(f"{thing} was not dragged to {target}")
    yield from hand.go(hand.position + _APPROACH_M * _UP, rotation, near=0.03, limit=20)
    yield from hand.open()


def is_dish(scene: Scene, thing: str) -> bool:
    """Whether `thing` is wide and flat: the fingers hold its rim too loosely to lift it."""
    width, depth, height = np.ptp(scene.points(thing), axis=0)
    return min(width, depth) > 0.1 and height < 0.03


def _leave_roof(scene: Scene, hand: Hand, thing: str, rotation: np.ndarray) -> Actions:
    """Slide what is held out from under a drawer or shelf, if there is one over it."""
    points, others = scene.points(thing), scene.others(thing)
    low, high = points.min(0), points.max(0)
    near = (others[:, :2] > low[:2]).all(1) & (others[:, :2] < high[:2]).all(1)
    higher = others[near & (others[:, 2] > high[2])]
    apart = np.linalg.norm(higher[:, None, :2] - points[None, ::4, :2], axis=-1)
    roof = higher[apart.min(1, initial=np.inf) < _ROOF_M]
    if not len(roof):
        return
    away = 0.5 * (low + high)[:2] - roof[:, :2].mean(0)
    away = away / max(float(np.linalg.norm(away)), 1e-6)
    deep = float((high[:2] - low[:2]).max()) + 2 * _ROOF_M
    goal = hand.position + np.array([*(deep * away), 0.005])
    yield from hand.go(goal, rotation, near=0.02, limit=30, slow=0.5)


def place(scene: Scene, hand: Hand, thing: str, target: str) -> Actions:
    """Put `thing`, which is held, into or onto `target`, and let go."""
    rotation = hand.pointing_down(hand.yaw)
    inside = scene.is_region(target)
    goal = scene.target(target)
    points, obstacles = scene.points(thing), scene.others(thing)
    bottom = points[:, 2].min()
    radius = 0.5 * np.ptp(points[:, :2], axis=0).max() + 0.03
    rim = _highest(obstacles, goal[:2], goal[:2], radius + 0.04, scene.table_height())
    top = _highest(obstacles, hand.position[:2], goal[:2], radius, rim)
    carry = hand.position[2] + max(0.0, top + _OVER_OBSTACLES_M - bottom)
    yield from hand.go(np.array([*hand.position[:2], carry]), rotation, near=0.02, limit=40)
    for near_enough in (0.02, 0.006):  # the second look corrects for what swung or turned
        offset = scene.origin(thing)[:2] - hand.position[:2]
        yield from hand.go(np.array([*(goal[:2] - offset), carry]), rotation, near=near_enough, limit=60)
    floor = scene.floor(thing, goal[:2], goal[2] + 0.02 if inside else np.inf)
    drop = hand.position[2] - (scene.points(thing)[:, 2].min() - floor - 0.008)
    if inside and rim > floor + 0.05:
        drop = max(drop, rim + PALM_ABOVE + 0.01)  # the palm stays above the walls
    yield from hand.go(np.array([*hand.position[:2], drop]), rotation, near=0.006, limit=30, slow=0.5)
    yield from hand.open()
    yield from hand.go(hand.position + 0.08 * _UP, rotation, near=0.03, limit=20)


def travel(scene: Scene, hand: Hand, goal: np.ndarray, rotation: np.ndarray) -> Actions:
    """Go to `goal`, metres f64[3], over what stands in the way, with an empty hand."""
    obstacles = scene.everything()
    start, way = hand.position[:2], goal[:2] - hand.position[:2]
    height = max(goal[2], _highest(obstacles, start, goal[:2], 0.09, 0.0) + _OVER_OBSTACLES_M)
    if hand.position[2] < height - 0.02 and np.linalg.norm(way) > 0.03:
        yield from hand.go(np.array([*start, height]), hand.rotation, near=0.03, limit=30)
    yield from hand.go(np.array([*goal[:2], max(height, goal[2])]), rotation, near=0.015, limit=60)
    if height > goal[2] + 0.02:
        yield from hand.go(goal, rotation, near=0.015, limit=30)


def _highest(points: np.ndarray, start: np.ndarray, goal: np.ndarray, radius: float, otherwise: float) -> float:
    """The greatest height of `points` f64[P 3] within `radius` of the way from `start` to `goal`, both f64[2]."""
    way = goal - start
    share = np.clip((points[:, :2] - start) @ way / max(way @ way, 1e-9), 0, 1)
    beside = np.linalg.norm(points[:, :2] - start - share[:, None] * way, axis=1)
    return max(float(points[beside < radius, 2].max(initial=otherwise)), otherwise)
