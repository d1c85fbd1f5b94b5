"""The interface of one simulated LIBERO task, with what its two implementations share.

Both begin an episode with upstream's own reset. What it draws from numpy's global generator (where fixtures stand, and
where objects stand unless a stored state says so) is drawn from a seed, and the generator's state is restored.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.envs.libero.distractors import Distractors
from reachrl.envs.libero.upstream import CAMERA, regions_of, seeded
from reachrl.envs.scene_variants import SceneVariants
from reachrl.types import Start

FINGERS_OPEN_M = 0.08  # between the fingers of an open gripper
HIDDEN_GROUPS = (0,)  # geom group 0 holds collision shapes; upstream does not draw it either
_PIVOT_M = (0.0, 0.0, 0.8)  # the middle of the workspace: what the fixed camera is turned about
_WRITTEN = ("body_pos", "body_quat", "site_rgba", "cam_pos", "cam_quat")


def pristine_arrays(model: Any) -> dict[str, np.ndarray]:
    """Copies of those arrays of a model that an episode may write into."""
    return {name: getattr(model, name).copy() for name in _WRITTEN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Posture:
    """Another posture of the arm at the beginning of an episode."""

    joints: Sequence[float]
    """Seven positions, rad."""
    at_rest: bool
    """Whether the controller pulls the elbow to this posture, and a stored state overrides it; otherwise the arm begins
    in it, whatever is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Other places of a task's things and furniture."""

    definition: Path
    """A task file that differs from the task's own in nothing but its regions."""
    state: np.ndarray
    """Stored time, positions and velocities f64[K] that replace those of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """What an episode does to a simulation."""

    aim: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    """Position f64[3] and quaternion f64[4] of the fixed camera, from those that it usually has."""
    posture: Posture | None = None
    looks: Start | None = None
    """Whose variant says how the scene looks."""
    layout: Layout | None = None
    distractors: Start | None = None
    """Whose variant says how many there are."""


class Simulation(ABC):
    """One task.

    Attributes:
        domain: upstream's task object: its `sim`, objects, fixtures and parsed definition.
        distractors: places what the scene has beside the task's things, if it has any.
    """

    domain: Any
    distractors: Distractors | None = None
    _looks: SceneVariants | None = None
    _regions: dict[str, Any] | None = None  # the task's own, once they were ever replaced

    def reset(self, seed: int, state: np.ndarray | None, perturbation: Perturbation | None = None) -> None:
        """Begin an episode.

        Args:
            seed: of what the reset draws.
            state: stored time, positions and velocities f64[K] that replace the drawn ones, or none.
            perturbation: what else is changed.
        """
        posture = None if perturbation is None else perturbation.posture
        self._stand(None if posture is None else posture.joints)
        layout = None if perturbation is None else perturbation.layout
        self._lay_out(None if layout is None else layout.definition)
        state = state if layout is None else layout.state
        if self._looks is not None:
            self._reload_textures(self._looks.undo())  # before the reset, which may draw a frame
        with seeded(seed):
            self._reset()
        if perturbation is not None and perturbation.looks is not None:
            self._look(perturbation.looks)
        if perturbation is not None and perturbation.aim is not None:
            camera = self.model.camera(CAMERA)
            camera.pos[:], camera.quat[:] = perturbation.aim(camera.pos.copy(), camera.quat.copy())
        if posture is not None and not posture.at_rest:
            robot = self.domain.robots[0]
            robot.controller.initial_joint = np.array(robot.robot_model.init_qpos)
            state = None if state is None else self._with_joints(state, posture.joints)
        sim = self.domain.sim
        if state is not None:
            sim.set_state_from_flattened(state if self.distractors is None else self.distractors.widened(state))
        if self.distractors is not None:
            self.distractors.place(None if perturbation is None else perturbation.distractors)
        if state is not None or perturbation is not None:
            sim.forward()
            self.domain._check_success()  # it also switches what is seen of a stove
            self.domain._post_process()

    def _look(self, start: Start) -> None:
        if self._looks is None or self._looks.model is not self.model:  # a reset may have made another one
            things = tuple(f"{name}_" for name in (*self.domain.objects_dict, *self.domain.fixtures_dict))
            self._looks = SceneVariants(
                self.model,
                (CAMERA,),
                _PIVOT_M,
                lambda body: not body.startswith(things),
                HIDDEN_GROUPS,
                objects_keep_theirs=True,  # instructions name things by what they are, which their looks say
                original=self._original,
            )
        self._reload_textures(self._looks.apply(start, ""))

    def _original(self) -> Any:
        """An `MjModel` that has the textures of the scene as it was made."""
        return self.model

    @abstractmethod
    def _reload_textures(self, textures: list[int]) -> None:
        """Draw with some textures as the model holds them now."""

    def _stand(self, joints: Sequence[float] | None) -> None:
        """Joint positions that the next reset brings the arm to; None: the robot's own."""
        robot = self.domain.robots[0]
        robot.init_qpos = np.array(robot.robot_model.init_qpos if joints is None else joints)
        # Where a reset makes the robot anew, from these.
        self.domain.robot_configs[0]["initial_qpos"] = None if joints is None else robot.init_qpos

    def _lay_out(self, definition: Path | None) -> None:
        """Regions of the task file that the next reset places things and furniture in; None: the task's own."""
        if definition is None and self._regions is None:
            return
        problem = self.domain.parsed_problem
        self._regions = problem["regions"] if self._regions is None else self._regions
        regions = self._regions if definition is None else regions_of(definition)
        if regions != problem["regions"]:
            problem["regions"] = regions
            self._move_regions()

    @abstractmethod
    def _move_regions(self) -> None:
        """Do what upstream does with the regions of a task file when it composes the scene."""

    def _with_joints(self, state: np.ndarray, joints: Sequence[float]) -> np.ndarray:
        """A stored state with other positions of the arm's joints."""
        changed = state.copy()
        changed[1 + np.array(self.domain.robots[0]._ref_joint_pos_indexes)] = joints
        return changed

    @abstractmethod
    def _reset(self) -> None:
        """Upstream's reset."""

    @abstractmethod
    def step(self, action: np.ndarray) -> bool:
        """One control step of 50 ms with an action f64[7] in the simulator's convention; whether the task is solved."""

    @abstractmethod
    def frame(self, camera: str) -> np.ndarray:
        """What a camera sees u8[H W 3], turned by 180° as published policies expect it."""

    @abstractmethod
    def close(self) -> None:
        """Free the GL context, if it is this task's own."""

    @property
    def model(self) -> Any:
        """The `MjModel`."""
        return self.domain.sim.model._model

    @property
    def data(self) -> Any:
        """The `MjData`."""
        return self.domain.sim.data._data

    def ee_state(self) -> np.ndarray:
        """Position between the fingers in metres, and how far they are open (0..1): f32[4]."""
        robot = self.domain.robots[0]
        fingers = self.data.qpos[robot._ref_gripper_joint_pos_indexes]
        opening = np.clip((fingers[0] - fingers[1]) / FINGERS_OPEN_M, 0.0, 1.0)
        return np.array([*self.data.site_xpos[robot.eef_site_id], opening], np.float32)

    def state(self) -> np.ndarray:
        """Hand position (3, m), orientation (3, axis times angle in rad) and finger joints (2, m): f32[8].

        Source: openpi, examples/libero/main.py: `robot0_eef_pos`, `_quat2axisangle(robot0_eef_quat)` and
        `robot0_gripper_qpos`, in this order.
        """
        robot = self.domain.robots[0]
        fingers = self.data.qpos[robot._ref_gripper_joint_pos_indexes]
        turned = axis_angle(self.data.body(robot.robot_model.eef_name).xquat)
        return np.array([*self.data.site_xpos[robot.eef_site_id], *turned, *fingers], np.float32)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """The rotation axis times the angle in 0..2 pi rad, f64[3], of a unit quaternion (w, x, y, z).

    Source: `quat2axisangle` of robosuite, which takes the angle from w as it is: q and -q give other numbers.
    """
    w = float(np.clip(quaternion[0], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    if np.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[1:], np.float64) * 2.0 * np.arccos(w) / length
