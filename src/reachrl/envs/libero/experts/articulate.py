"""Moving what hangs on a joint: knobs are twisted, doors pushed round, drawers pulled open and pushed shut."""

import numpy as np

from reachrl.envs.libero.experts.grasp import find_grasps
from reachrl.envs.libero.experts.hand import Actions, Hand, facing
from reachrl.envs.libero.experts.pick_place import NotDone, travel
from reachrl.envs.libero.experts.scene import Joint, Scene

_UP = np.array([0.0, 0.0, 1.0])
_FREE_M = 0.10  # between the hand and a drawer before and after they touch
_BEHIND_M = 0.035  # between the hand and a drawer it is going to push
_BESIDE_M = 0.022  # sideways from closed fingers to what they go down beside
_TILT = np.pi / 4  # of a hand that pushes a drawer: its palm stays away from the drawers above
_FURTHER_M = 0.02  # beyond the joint's end, so that the arm presses
_FURTHER_RAD = 0.3
_ARC_RAD = 0.12  # between the stations of a way round
_KNOB_M = 0.08  # what extends further from its axis is a door
_TWIST_RAD = 0.3  # by which the hand would rather begin too early
_TRIES = 3


def reach_state(scene: Scene, hand: Hand, goal: list[str]) -> Actions:
    """Turn, open or close what `goal` names.

    Args:
        scene: where.
        hand: with what; empty.
        goal: a predicate about one thing, such as `open` or `turnon`.

    Raises:
        NotDone: it did not get there.
    """
    for _ in range(_TRIES):
        joint = scene.joint(goal)
        if joint.hinge and _reach(scene, joint) < _KNOB_M:
            yield from _twist(scene, hand, joint, goal)
        elif joint.hinge:
            yield from _push_round(scene, hand, joint, goal)
        elif goal[0] == "open":
            yield from _pull(scene, hand, joint, goal)
        else:
            yield from _push_shut(scene, hand, joint, goal)
        if scene.holds(goal):
            return
    raise NotDone(f"{' '.join(goal)}: still not so")


def _twist(scene: Scene, hand: Hand, joint: Joint, goal: list[str]) -> Actions:
    """Take a knob from above and turn it about its vertical axis."""
    points, others = scene.points_of_body(joint.body), scene.others_than_body(joint.body)
    support = 0.5 * (points[:, 2].min() + points[:, 2].max())  # of its grip; below it is a plate
    grasps = find_grasps(points, others, support, hand.yaw - np.sign(joint.turn) * _TWIST_RAD)
    if not grasps:
        raise NotDone(f"no grasp found for {' '.join(goal)}")
    grasp = grasps[0]
    rotation = hand.pointing_down(grasp.yaw)
    yield from hand.open()
    yield from travel(scene, hand, grasp.position + 0.06 * _UP, rotation)
    yield from hand.go(grasp.position, rotation, near=0.004, limit=40, slow=0.6)
    yield from hand.close()
    for angle in np.arange(0.0, joint.turn, np.sign(joint.turn) * _ARC_RAD):
        if scene.holds(goal):
            break
        turn = _turned(np.eye(3), angle)
        place = joint.anchor + turn @ (grasp.position - joint.anchor)
        yield from hand.go(place, turn @ rotation, near=0.01, limit=4)
    yield from hand.open()
    yield from hand.go(hand.position + 0.1 * _UP, hand.rotation, near=0.03, limit=20)
    yield from hand.go_home()


def _reach(scene: Scene, joint: Joint) -> float:
    """How far from its axis something on a vertical hinge extends, metres."""
    return float(np.linalg.norm((scene.points_of_body(joint.body) - joint.anchor)[:, :2], axis=1).max())


def _push_round(scene: Scene, hand: Hand, joint: Joint, goal: list[str]) -> Actions:
    """Push the far end of what turns about a vertical axis, with closed fingers that point down."""
    points = scene.points_of_body(joint.body)
    high = points[points[:, 2] > 0.5 * (points[:, 2].min() + points[:, 2].max())]
    arms = high - joint.anchor
    reach = np.linalg.norm(arms[:, :2], axis=1)
    arm = arms[reach.argmax()] * np.array([0.8, 0.8, 1.0])
    arm[2] = high[:, 2].max() - 0.01 - joint.anchor[2]
    step, first = np.sign(joint.turn) * _ARC_RAD, 0.0
    while abs(first) < np.pi and _nearest(high, joint.anchor + _turned(arm, first)) < _BESIDE_M:
        first -= step  # back to where the fingers go down beside it
    rotation = hand.pointing_down(hand.yaw)
    last = joint.turn + np.sign(joint.turn) * _FURTHER_RAD
    stations = [joint.anchor + _turned(arm, angle) for angle in np.arange(first, last, step)]
    yield from hand.close()
    yield from travel(scene, hand, stations[0] + 0.06 * _UP, rotation)
    yield from hand.go(stations[0], rotation, near=0.008, limit=25, slow=0.6)
    for station in stations[1:]:
        if scene.holds(goal):
            break
        yield from hand.go(station, rotation, near=0.012, limit=8)
    yield from hand.go(hand.position + 0.08 * _UP, rotation, near=0.03, limit=20)
    yield from hand.open()


def _pull(scene: Scene, hand: Hand, joint: Joint, goal: list[str]) -> Actions:
    """Grasp a drawer's handle from the front, one finger over it and one under it."""
    out = np.sign(joint.distance) * joint.axis
    handle = scene.handle(joint)
    rotation = facing(-out, -_UP)
    yield from hand.open()
    free = handle + _FREE_M * out
    yield from travel(scene, hand, free + 0.05 * _UP, rotation)
    yield from hand.go(free, rotation, near=0.01, limit=40)
    yield from hand.go(handle, rotation, near=0.006, limit=40, slow=0.6)
    yield from hand.close()
    start = hand.position
    while not scene.holds(goal):
        before = hand.position
        yield from hand.go(start + (abs(joint.distance) + _FURTHER_M) * out, rotation, near=0.01, limit=10)
        if np.linalg.norm(hand.position - before) < 0.005:
            break
    yield from hand.open()
    yield from hand.go(hand.position + _FREE_M * out, rotation, near=0.02, limit=30)
    yield from hand.go_home()


def _push_shut(scene: Scene, hand: Hand, joint: Joint, goal: list[str]) -> Actions:
    """Push a drawer's handle with closed fingers that lean towards the cabinet."""
    shut = np.sign(joint.distance) * joint.axis
    handle = scene.handle(joint)
    pointing = np.sin(_TILT) * shut - np.cos(_TILT) * _UP
    rotation = facing(pointing, np.cross(_UP, shut))
    behind = handle - _BEHIND_M * shut
    yield from hand.close()
    yield from travel(scene, hand, behind - 0.04 * shut + 0.1 * _UP, rotation)
    yield from hand.go(behind, rotation, near=0.01, limit=40, slow=0.6)
    for _ in range(6):
        if scene.holds(goal):
            break
        end = scene.handle(joint) + _FURTHER_M * shut
        yield from hand.go(end, rotation, near=0.005, limit=10)
    yield from hand.go(hand.position - _FREE_M * shut, rotation, near=0.02, limit=20)
    yield from hand.go_home()
    yield from hand.open()


def _nearest(points: np.ndarray, place: np.ndarray) -> float:
    """Distance, seen from above, of `place` f64[3] from the nearest of `points` f64[P 3]: metres."""
    return float(np.linalg.norm(points[:, :2] - place[:2], axis=1).min())


def _turned(arm: np.ndarray, angle: float) -> np.ndarray:
    """`arm` f64[3] turned about the vertical."""
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return turn @ arm
