"""Meta-World as language tasks seen through named cameras, with sparse success and numbered starts."""

from typing import Any

import gymnasium as gym
import numpy as np

from reachrl.config.env import MetaworldConfig
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.config.perturbations import Variant
from reachrl.envs.base import Env, check_start, observed, start_option
from reachrl.envs.metaworld_task import MetaworldTask
from reachrl.envs.render import Renderer
from reachrl.envs.render_device import check_rendering
from reachrl.envs.scene_variants import SceneVariants
from reachrl.types import Split, Start

_CLOSER_M = {"corner2": (0.75, 0.075, 0.7)}  # close enough for the workspace to fill the frame
_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")  # how these cameras hang
_PHYSICS_STEP_S = 0.0125
_PIVOT_M = (0.0, 0.65, 0.1)  # the middle of the workspace: what cameras are turned about
_SURROUNDINGS = ("world", "tablelink", "RetainingWall", "controller_box", "pedestal", "torso", "head", "hand")


class MetaworldEnv(Env):
    """The tasks of `config.tasks`, one simulator each, made when first needed.

    Actions are f32[4] in [-1, 1]: hand displacement x y z (times 1 cm a simulator step) and gripper
    effort (-1 opens, 1 closes), held for `config.action_repeat` simulator steps. The state is `ee_state`.
    """

    Config = MetaworldConfig
    shares_process = True  # meshes and textures, which a core's caches then hold once, and start states
    metadata = {"render_modes": []}

    def __init__(self, config: MetaworldConfig):
        self.config = config
        self.tasks = config.tasks
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = observed(config.cameras, config.image_size, state_size=4)
        self.control_hz = 1.0 / (_PHYSICS_STEP_S * config.action_repeat)
        self._renderer = Renderer.shared(config.image_size)
        self._made: dict[str, tuple[MetaworldTask, dict[str, int], SceneVariants]] = {}
        self._printed: dict[str, dict[str, int]] = {}  # scenes with textures of their own, of each task
        self._task: MetaworldTask | None = None
        self._scenes: dict[str, int] = {}  # of each camera
        self._steps = 0
        self._over = True

    @classmethod
    def prepare(cls, config: MetaworldConfig) -> None:
        """Check that frames can be drawn, before workers are to draw them."""
        check_rendering()

    def instruction(self, task: str) -> str:
        """The sentence that describes `task`."""
        return INSTRUCTIONS[task]

    def start_vector(self, task: str, split: Split, index: int) -> np.ndarray:
        """The start vector of start `index` of `task`: positions in metres f64[K], as Meta-World draws them."""
        return self._simulator(task)[0].start(split, index)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode `options["start"]`; nothing here is random, so `seed` changes nothing."""
        start = start_option(options)
        check_start(self, start)
        self._task, self._scenes, looks = self._simulator(start.task)
        if printed := looks.apply(start, self.instruction(start.task)):
            self._scenes = self._with_own_textures(start.task, self._task.sim.model, printed)
        self._task.reset(self._start_vector(self._task, start))
        self._steps = 0
        self._over = False
        return self._observe(self._task), {"success": False, "progress": 0.0}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Hold `action` f32[4] until the task is solved or `action_repeat` simulator steps have passed."""
        if self._task is None or self._over:
            raise RuntimeError("the episode is over: call reset first")
        action = np.asarray(action, np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 4 finite numbers, got {action!r}")
        action = np.clip(action, -1.0, 1.0)
        success = any(self._task.step(action) for _ in range(self.config.action_repeat))
        self._steps += 1
        truncated = not success and self._steps >= self.config.max_steps
        self._over = success or truncated
        info = {"success": success, "progress": self._task.progress()}
        return self._observe(self._task), float(success), success, truncated, info

    def expert_action(self) -> np.ndarray:
        """Meta-World's scripted expert f32[4]; it reads the simulator's state, goal included."""
        if self._task is None:
            raise RuntimeError("call reset first")
        return self._task.expert_action()

    def close(self) -> None:
        """Free the GL context."""
        self._renderer.close()
        self._made.clear()
        self._printed.clear()

    def _start_vector(self, task: MetaworldTask, start: Start) -> np.ndarray:
        variant = Variant.of(start)
        if variant is None or variant.axis != "start":
            return task.start(start.split, start.index)
        return task.start_beyond(start.split, start.index, variant.value, variant.generator(start))

    def _simulator(self, task: str) -> tuple[MetaworldTask, dict[str, int], SceneVariants]:
        if task not in self._made:
            made = MetaworldTask(task, self.config.mesh_faces)
            for camera, position in _CLOSER_M.items():
                made.sim.model.camera(camera).pos[:] = position
            model, cameras, looks = made.sim.model, self.config.cameras, (made.scene, self.config.mesh_faces)
            scenes = {each: self._renderer.add(model, each, looks=looks) for each in cameras}
            self._made[task] = (made, scenes, SceneVariants(model, cameras, _PIVOT_M, _is_surroundings))
        return self._made[task]

    def _with_own_textures(self, task: str, model: Any, printed: list[int]) -> dict[str, int]:
        """The scenes of a task as its model has them now; textures of the others are shared between environments."""
        if task not in self._printed:
            self._printed[task] = {each: self._renderer.add(model, each) for each in self.config.cameras}
        for number in self._printed[task].values():
            self._renderer.reload_textures(number, printed)
        return self._printed[task]

    def _observe(self, task: MetaworldTask) -> dict[str, Any]:
        task.show_goal()
        state = task.ee_state()
        images = {camera: self._upright(camera, task) for camera in self.config.cameras}
        return {"images": images, "ee_state": state, "state": state.copy()}

    def _upright(self, camera: str, task: MetaworldTask) -> np.ndarray:
        frame = self._renderer.render(self._scenes[camera], task.sim.data)
        # GL counts rows from the bottom; of a camera that hangs upside down that leaves a mirrored row order.
        return (frame[:, ::-1] if camera in _UPSIDE_DOWN else frame[::-1]).copy()


def _is_surroundings(body: str) -> bool:
    """Whether a body belongs to the room or the robot."""
    return body.startswith((*_SURROUNDINGS, "right", "left"))
