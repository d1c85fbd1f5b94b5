"""One LIBERO task being simulated: upstream's own way, and a fast way that gives the same states.

Both begin an episode with upstream's own reset. What it draws from numpy's global generator (where fixtures stand, and
where objects stand unless a stored state says so) is drawn from a seed, and the generator is left as it was.
"""

import os
from abc import ABC, abstractmethod
from bdb import BdbQuit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.envs.libero.controller import ArmController
from reachrl.envs.libero.installation import bddl_file, import_upstream
from reachrl.envs.libero.slim import HIDDEN_GROUPS, slim_model
from reachrl.envs.mujoco_memory import release_compilation, release_textures
from reachrl.envs.render import Renderer

CAMERA = "agentview"
FINGERS_OPEN_M = 0.08  # between the fingers of an open gripper


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _problem(envs: Any, path: str) -> tuple[str, type]:
    """Name and class of upstream's that the task file at `path` asks for."""
    name = envs.env_wrapper.BDDLUtils.get_problem_info(path)["problem_name"]
    return name, envs.TASK_MAPPING[name]


def _extended(base: type, ours: type, **values: Any) -> type:
    """Upstream's class with `ours` put in front of it, and class attributes for ours."""
    return type(base.__name__, (ours, base), values)  # the name stays: upstream compares it with the one in the file


class Simulation(ABC):
    """One task.

    Attributes:
        domain: upstream's task object: its `sim`, objects, fixtures and parsed definition.
    """

    domain: Any

    def reset(self, seed: int, state: np.ndarray | None) -> None:
        """Begin an episode.

        Args:
            seed: of what the reset draws.
            state: stored time, positions and velocities f64[K] that replace the drawn ones, or none.
        """
        with _seeded(seed):
            self._reset()
        if state is not None:
            sim = self.domain.sim
            sim.set_state_from_flattened(state)
            sim.forward()
            self.domain._check_success()  # it also switches what is seen of a stove
            self.domain._post_process()

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


class _Kept:
    """Put in front of an upstream task class: its scene is compiled, and handed to the renderer, once.

    Upstream composes the same scene at every reset, compiles it and loads its textures anew: half of a reset's time.
    Where the text of the scene is the same the model is kept, without what the last episode wrote into it.
    """

    sim, _xml = None, ""

    def _initialize_sim(self: Any, xml_string: str | None = None) -> None:
        xml = xml_string or self.model.get_xml()
        if xml != self._xml:
            super()._destroy_sim()  # pyright: ignore[reportAttributeAccessIssue]
            super()._initialize_sim(xml)  # pyright: ignore[reportAttributeAccessIssue]
            release_compilation()
            self._xml, self._pristine = xml, _pristine(self.sim.model._model)
            return
        for name, values in self._pristine.items():
            getattr(self.sim.model, name)[:] = values
        self.sim.reset()
        for _ in range(2):  # upstream's new renderer computes it once more, which the solver's next start depends on
            self.sim.forward()
        self.initialize_time(self.control_freq)

    def _destroy_sim(self) -> None:
        """Nothing at a reset: the next one may need it."""

    def close(self) -> None:
        super()._destroy_sim()  # pyright: ignore[reportAttributeAccessIssue]


def _pristine(model: Any) -> dict[str, np.ndarray]:
    """Copies of those arrays of a model that upstream writes into during an episode."""
    return {name: getattr(model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}


class FaithfulSimulation(Simulation):
    """Upstream's `OffScreenRenderEnv`: its own stepping and drawing, its scene compiled once.

    Args:
        suite: of the task.
        task: its name.
        assets: folder with meshes and textures.
        image_size: side of the frames in pixels.
        cameras: what films.
    """

    def __init__(self, suite: str, task: str, assets: Path, image_size: int, cameras: Sequence[str] = (CAMERA,)):
        envs = import_upstream(assets)
        os.environ.pop("LP_PERF", None)  # what software rendering may leave out
        path = str(bddl_file(suite, task))
        problem, base = _problem(envs, path)
        envs.TASK_MAPPING[problem] = _extended(base, _Kept)  # where upstream looks its classes up
        try:
            self._env = envs.OffScreenRenderEnv(
                bddl_file_name=path,
                camera_heights=image_size,
                camera_widths=image_size,
                camera_names=list(cameras),
            )
        finally:
            envs.TASK_MAPPING[problem] = base
        self.domain = self._env.env
        release_textures(self.model)
        self._samplers = tuple(self.domain.object_property_initializers)
        self._seen: dict[str, np.ndarray] = {}

    def _reset(self) -> None:
        # Upstream's reset adds its samplers of drawers and knobs to those that are there, so that each reset draws
        # more than the one before. As if the task had just been made: the ones of the constructor and one reset.
        self.domain.object_property_initializers = list(self._samplers)
        self._seen = self._env.reset()

    def reset(self, seed: int, state: np.ndarray | None) -> None:
        """Begin an episode; see `Simulation.reset`."""
        super().reset(seed, state)
        if state is not None:
            self._env._update_observables(force=True)
            self._seen = self.domain._get_observations()

    def step(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved."""
        self._seen, _, solved, _ = self._env.step(action)
        return bool(solved)

    def frame(self, camera: str) -> np.ndarray:
        """The frame upstream drew with the last step."""
        return self._seen[f"{camera}_image"][::-1, ::-1].copy()

    def state(self) -> np.ndarray:
        """The state of the moment that upstream's frames show: the first of the step's physics steps, not the last."""
        x, y, z, w = self._seen["robot0_eef_quat"]
        turned = axis_angle(np.array([w, x, y, z]))
        return np.array([*self._seen["robot0_eef_pos"], *turned, *self._seen["robot0_gripper_qpos"]], np.float32)

    def close(self) -> None:
        """Free the GL context."""
        self._env.close()


class _Lean:
    """Put in front of an upstream task class: our model of its scene instead of one compiled anew."""

    mesh_faces = 0
    task_name = ""

    def _initialize_sim(self: Any, xml_string: str | None = None) -> None:
        from robosuite.utils.binding_utils import MjSim  # pyright: ignore[reportMissingImports]

        model = slim_model(xml_string or self.model.get_xml(), self.task_name, self.mesh_faces)
        self.pristine = _pristine(model)
        self.sim = MjSim(model)
        self.sim.forward()
        self.initialize_time(self.control_freq)


class FastSimulation(Simulation):
    """The same physics without what nobody looks at: no model built anew at a reset, no observables, one frame a step.

    Args:
        suite: of the task.
        task: its name.
        assets: folder with meshes and textures.
        mesh_faces: see `LiberoConfig`.
        renderer: draws for all tasks of the process.
        cameras: what films.
    """

    def __init__(
        self,
        suite: str,
        task: str,
        assets: Path,
        mesh_faces: int,
        renderer: Renderer,
        cameras: Sequence[str] = (CAMERA,),
    ):
        envs = import_upstream(assets)
        from robosuite import load_controller_config  # pyright: ignore[reportMissingImports]

        path = str(bddl_file(suite, task))
        _, base = _problem(envs, path)
        self.domain = _extended(base, _Lean, mesh_faces=mesh_faces, task_name=task)(
            path,
            robots=["Panda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
            hard_reset=False,
        )
        self.domain.object_property_initializers *= 2  # what a reset of upstream's makes of them
        self._renderer = renderer
        self._scenes = {each: renderer.add(self.model, each, hidden_groups=HIDDEN_GROUPS) for each in cameras}
        self._controller = ArmController(self.domain)

    def _reset(self) -> None:
        """What upstream's reset leaves behind, without building the model again."""
        from robosuite.utils.errors import RandomizationError  # pyright: ignore[reportMissingImports]

        domain = self.domain
        while True:
            domain.sim.reset()
            for name, values in domain.pristine.items():
                getattr(self.model, name)[:] = values
            domain.sim.forward()
            domain.robots[0].gripper.current_action = np.zeros(1)
            try:
                domain._reset_internal()
                break
            except (RandomizationError, BdbQuit):  # objects did not fit: upstream draws again, or opens a debugger
                continue
        domain.sim.forward()
        domain.visualize(vis_settings=dict.fromkeys(domain._visualizations, False))
        self._controller.reset()

    def step(self, action: np.ndarray) -> bool:
        """One control step; whether the task is solved."""
        self._controller.step(action)
        domain = self.domain
        solved = bool(domain._check_success())
        domain._post_process()
        return solved

    def frame(self, camera: str) -> np.ndarray:
        """Draw the present state."""
        return self._renderer.render(self._scenes[camera], self.data)[::-1, ::-1].copy()

    def close(self) -> None:
        """Nothing: the renderer belongs to the process."""
