"""A simulator that steps all its worlds at once, as one plug-in file: sliders on rails, in numpy arrays.

Two cameras of different sizes film each, and the state is the slider's place, its goal and 1.
"""

import numpy as np

from reachrl.config.env import EnvSection
from reachrl.envs.base import Shown, start_key
from reachrl.envs.batch import BatchedEnv, Worlds

SPEED, NEAR = 0.05, 0.1


class SlidersConfig(EnvSection):
    kind: str = "batched_worlds:Sliders"
    tasks: tuple[str, ...] = ("left", "right")
    image_size: int = 24
    max_steps: int = 12
    num_envs: int = 4


class Sliders(BatchedEnv):
    """The first number of an action moves the slider; the others do nothing."""

    Config = SlidersConfig

    def __init__(self, config, num_envs):
        super().__init__(config, num_envs)
        self.tasks, self.action_dim = config.tasks, 4
        side = config.image_size
        self.shown = Shown(cameras={"front": (side, side, 3), "back": (side // 2, side // 2, 3)}, state_size=3)
        self.x, self.goal = np.zeros(num_envs), np.zeros(num_envs)

    def instruction(self, task):
        return f"push the bar to the {task} end"

    def begin(self, rows, starts):
        self.x[rows] = [np.random.default_rng(start_key(start)).uniform(0.3, 0.7) for start in starts]
        self.goal[rows] = [float(start.task == "right") for start in starts]

    def act(self, actions, running):
        self.x = np.where(running, np.clip(self.x + SPEED * np.clip(actions[:, 0], -1, 1), 0, 1), self.x)

    def look(self):
        side = self.config.image_size
        distance = np.abs(np.arange(side) - self.x[:, None] * (side - 1))
        bar = (255 * np.clip(2.5 - distance, 0, 1)).astype(np.uint8)
        images = np.broadcast_to(bar[:, None, :, None], (self.num_envs, side, side, 3)).copy()
        pose = np.stack([self.x, 0 * self.x, 0 * self.x, 0 * self.x + 1], axis=1).astype(np.float32)
        far = np.abs(self.x - self.goal)
        return Worlds(
            images={"front": images, "back": 255 - images[:, ::2, ::2]},
            ee_state=pose,
            state=np.stack([self.x, self.goal, 0 * self.x + 1], axis=1).astype(np.float32),
            success=far < NEAR,
            progress=(1 - far).astype(np.float32),
        )
