"""Moving the hand: actions that bring it to a pose."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from reachrl.envs.libero.simulation import Simulation

OPEN, CLOSE = -1.0, 1.0
_METRES_PER_UNIT = 0.05
_RADIANS_PER_UNIT = 0.5
_GAIN = 2.5  # the arm covers only part of what is asked in one step
_STALLED_STEPS = 8
_STALLED_M = 0.002  # moved less than this (and turned less than a radian) in so many steps
_FINGER_STEPS = (3, 10)  # at least and at most, of a gripper that opens or closes
_FINGERS_STILL = 0.02  # change of the opening (0..1) in one step

Actions = Iterator[np.ndarray]


class Hand:
    """The gripper of a running simulation.

    Args:
        simulation: what it acts in.
    """

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        self._site = simulation.domain.robots[0].eef_site_id
        self.grip = OPEN
        self._home = self.position, self.rotation

    @property
    def position(self) -> np.ndarray:
        """Between the fingers, metres f64[3]."""
        return self.simulation.data.site_xpos[self._site].copy()

    @property
    def rotation(self) -> np.ndarray:
        """Its axes as columns f64[3 3]: the fingers close along the first and point along the third."""
        return self.simulation.data.site_xmat[self._site].reshape(3, 3).copy()

    @property
    def yaw(self) -> float:
        """Direction in which the fingers close, rad."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    def pointing_down(self, yaw: float) -> np.ndarray:
        """The rotation f64[3 3] with the fingers down and closing along `yaw`, whichever of the two is nearer."""
        closing = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        if closing @ self.rotation[:, 0] < 0:
            closing = -closing
        return facing(np.array([0.0, 0.0, -1.0]), closing)

    def go(
        self, position: np.ndarray, rotation: np.ndarray, *, near: float = 0.006, limit: int = 60, slow: float = 1.0
    ) -> Actions:
        """Move to a pose.

        Args:
            position: metres f64[3].
            rotation: f64[3 3].
            near: metres at which it is reached.
            limit: most steps to take.
            slow: greatest displacement per step, in units of the action.
        """
        before: list[np.ndarray] = []
        for _ in range(limit):
            error, turn = position - self.position, _turn(rotation, self.rotation)
            if np.linalg.norm(error) < near and np.linalg.norm(turn) < 0.06:
                return
            before.append(np.concatenate([self.position, self.rotation[:, 0] * _STALLED_M]))
            if len(before) > _STALLED_STEPS and np.linalg.norm(before[-1] - before[-_STALLED_STEPS]) < _STALLED_M:
                return  # the arm's joints or a thing in the way allow no more
            move = np.clip(_GAIN * error / _METRES_PER_UNIT, -slow, slow)
            spin = np.clip(_GAIN * turn / _RADIANS_PER_UNIT, -0.5, 0.5)
            yield np.array([*move, *spin, self.grip])

    def go_home(self) -> Actions:
        """Return to where the episode began: far from the ends of the arm's joints."""
        position, rotation = self._home
        yield from self.go(position, rotation, near=0.05, limit=60)

    def close(self) -> Actions:
        """Close the fingers."""
        yield from self._move_fingers(CLOSE)

    def open(self) -> Actions:
        """Open them."""
        yield from self._move_fingers(OPEN)

    def _move_fingers(self, grip: float) -> Actions:
        """Wait no longer than they move: a policy that imitates this sees no other reason to end the wait."""
        self.grip = grip
        least, most = _FINGER_STEPS
        for step in range(most):
            before = self.simulation.ee_state()[3]
            yield from self.hold(1)
            if step >= least and abs(self.simulation.ee_state()[3] - before) < _FINGERS_STILL:
                return

    def hold(self, steps: int) -> Actions:
        """Stay."""
        for _ in range(steps):
            yield np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, self.grip])


def facing(pointing: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """The rotation f64[3 3] of a hand whose fingers point along one unit vector and close along another."""
    return np.column_stack([closing, np.cross(pointing, closing), pointing])


def _turn(wanted: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Axis times angle f64[3] from `now` to `wanted`, in the world."""
    relative: Any = wanted @ now.T
    angle = np.arccos(np.clip(0.5 * (np.trace(relative) - 1), -1, 1))
    axis = np.array([relative[2, 1] - relative[1, 2], relative[0, 2] - relative[2, 0], relative[1, 0] - relative[0, 1]])
    length = np.linalg.norm(axis)
    return axis / length * angle if length > 1e-9 else np.zeros(3)
