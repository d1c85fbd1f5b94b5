"""One episode of LIBERO-Plus in a LIBERO simulation: camera, posture of the arm, layout, what frames go through."""

from dataclasses import dataclass

import numpy as np

from reachrl.config.libero_plus import INSTALL_PLUS, PlusTask, View, is_upstream, robot_posture
from reachrl.config.libero_plus_files import layout_files
from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.installation import read_states
from reachrl.envs.libero.plus_frames import corrupted
from reachrl.envs.libero.simulation import CAMERA, Layout, Perturbation, Posture
from reachrl.errors import ConfigError
from reachrl.streams import Stream, generator
from reachrl.types import Start

_PIVOT_M = np.array([0.0, 0.0, 0.8])
_DIGITS = 4  # upstream rounds a camera's pose after each turn


@dataclass(frozen=True, slots=True, kw_only=True)
class PlusEpisode:
    """What is perturbed about one episode."""

    suite: str
    start: Start
    task: PlusTask

    @classmethod
    def of(cls, suite: str, start: Start) -> "PlusEpisode | None":
        """That of a start in a suite of LIBERO; None where it asks for none.

        Raises:
            ConfigError: it names no task of the suite.
        """
        task = PlusTask.of(start)
        return None if task is None else cls(suite=suite, start=start, task=task)

    def perturbation(self) -> Perturbation:
        """What a simulation is told at the beginning.

        Upstream lets the arm stand in the task's posture and sets the base task's stored state, which takes the arm
        back; what stays is the posture that the controller pulls the elbow to. The corrected protocol has the arm
        begin in the task's posture, and the controller as always.

        Raises:
            MissingExtra: it needs the package, which is not installed.
            ConfigError: a file of the package is missing or damaged.
        """
        posture = None
        if self.task.robot:
            posture = Posture(joints=robot_posture(self.task.robot), at_rest=is_upstream(self.start))
        return Perturbation(
            aim=lambda position, turn: camera_pose(position, turn, self.task.view),
            posture=posture,
            layout=self._layout() if self.task.layout else None,
        )

    def _layout(self) -> Layout:
        definition, states = layout_files(self.suite, self.start.task, self.task.name)
        if not definition.is_file():
            raise ConfigError(
                f"{definition} is missing: LIBERO-Plus has no such task, or is not completely installed; run  "
                f"{INSTALL_PLUS}"
            )
        return Layout(definition=definition, state=read_states(states, INSTALL_PLUS)[0])

    def seen(self, camera: str, frame: np.ndarray, step: int) -> np.ndarray:
        """A camera's frame u8[H W 3] after `step` control steps, turned by 180° as all frames here are."""
        corruption = self.task.corruption
        if corruption is None or camera != CAMERA:
            return frame
        rng = generator(0, Stream.PERTURBATION, "plus", self.start.task, self.start.index, self.task.name, step)
        return corrupted(frame[::-1, ::-1], *corruption, rng)[::-1, ::-1].copy()


def camera_pose(position: np.ndarray, orientation: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Where LIBERO-Plus puts a camera.

    Args:
        position: of the camera, f64[3] in metres.
        orientation: its quaternion f64[4], w first.
        view: the task's.

    Returns:
        Position and quaternion, rounded as upstream's; also where the view is the original's.
    """
    if view.above:
        up = _about((0.0, 1.0, 0.0), -view.above)
        position, orientation = _PIVOT_M + _turned(up, position - _PIVOT_M), _product(up, orientation)
        position, orientation = position.round(_DIGITS), orientation.round(_DIGITS)
    around = _about((0.0, 0.0, 1.0), view.around)
    position = _turned(around, position).round(_DIGITS)
    orientation = _product(around, orientation).round(_DIGITS)
    if view.distance != 100:
        position = (_PIVOT_M + (position - _PIVOT_M) * (view.distance / 100)).round(_DIGITS)
    if view.turned:
        orientation = _product(_about((0.0, 0.0, 1.0), view.turned), orientation).round(_DIGITS)
    if view.tilted:
        orientation = _product(_about((0.0, 1.0, 0.0), -view.tilted), orientation).round(_DIGITS)
    return position, orientation


def _about(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    """The quaternion f64[4] of a turn."""
    turn = np.zeros(4)
    import_mujoco().mju_axisAngle2Quat(turn, np.array(axis), np.radians(degrees))
    return turn


def _product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The unit quaternion f64[4] of two turns, `other` first."""
    product = np.zeros(4)
    import_mujoco().mju_mulQuat(product, one, other)
    return product / np.linalg.norm(product)


def _turned(turn: np.ndarray, point: np.ndarray) -> np.ndarray:
    """A point f64[3], turned by a quaternion about the origin."""
    turned = np.zeros(3)
    import_mujoco().mju_rotVecQuat(turned, point, turn)
    return turned
