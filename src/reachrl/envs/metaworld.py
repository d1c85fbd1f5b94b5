"""Meta-World as language tasks seen through one camera, with sparse success and numbered starts."""

from typing import Any

import gymnasium as gym
import numpy as np

from reachrl.config.env import MetaworldConfig
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.envs.base import Env, check_start, start_option
from reachrl.envs.metaworld_task import MetaworldTask
from reachrl.envs.render import Renderer
from reachrl.envs.render_device import check_rendering
from reachrl.types import Split

_CAMERA = "corner2"
_CAMERA_POSITION_M = (0.75, 0.075, 0.7)  # close enough for the workspace to fill the frame


class MetaworldEnv(Env):
    """The tasks of `config.tasks` in one process, one simulator each, made when first needed.

    Actions are f32[4] in [-1, 1]: hand displacement x y z (times 1 cm a simulator step) and gripper
    effort (-1 opens, 1 closes), held for `config.action_repeat` simulator steps.
    """

    Config = MetaworldConfig
    metadata = {"render_modes": []}

    def __init__(self, config: MetaworldConfig):
        self.config = config
        self.tasks = config.tasks
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        size = config.image_size
        self.observation_space = gym.spaces.Dict(
            {
                "image": gym.spaces.Box(0, 255, (size, size, 3), np.uint8),
                "ee_state": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self._renderer = Renderer(size)
        self._made: dict[str, tuple[MetaworldTask, int]] = {}
        self._task: MetaworldTask | None = None
        self._scene = -1
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
        """What start `index` of `task` is: positions in metres f64[K], as Meta-World draws them."""
        return self._simulator(task)[0].start(split, index)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the episode `options["start"]`; nothing here is random, so `seed` changes nothing."""
        start = start_option(options)
        check_start(self, start)
        self._task, self._scene = self._simulator(start.task)
        self._task.reset(self._task.start(start.split, start.index))
        self._steps = 0
        self._over = False
        return self._observe(self._task), {"success": False, "progress": 0.0}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
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

    def _simulator(self, task: str) -> tuple[MetaworldTask, int]:
        if task not in self._made:
            made = MetaworldTask(task, self.config.mesh_faces)
            made.sim.model.camera(_CAMERA).pos[:] = _CAMERA_POSITION_M
            self._made[task] = (made, self._renderer.add(made.sim.model, _CAMERA))
        return self._made[task]

    def _observe(self, task: MetaworldTask) -> dict[str, np.ndarray]:
        task.show_goal()
        frame = self._renderer.render(self._scene, task.sim.data)
        # This camera hangs upside down and GL counts rows from the bottom: together, a mirrored row order.
        return {"image": frame[:, ::-1].copy(), "ee_state": task.ee_state()}
