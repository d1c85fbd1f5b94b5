"""A corridor to walk to one end or the other: several decisions an episode, nothing to see but one pixel."""

from typing import Any

import gymnasium as gym
import numpy as np

from reachrl.config.env import EnvSection
from reachrl.envs.base import Env, start_option
from reachrl.types import Split

LENGTH = 9  # cells; an episode begins in one of the middle three and must reach an end


class CorridorConfig(EnvSection):
    kind: str = "corridor:CorridorEnv"
    tasks: tuple[str, ...] = ("right", "left")
    image_size: int = 8
    max_steps: int = 8
    num_envs: int = 2


class CorridorEnv(Env):
    """The first pixel tells cell and task; the sign of the first action dimension is the step taken."""

    Config = CorridorConfig

    def __init__(self, config: CorridorConfig):
        self.config, self.tasks = config, config.tasks
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        size = config.image_size
        self.observation_space = gym.spaces.Dict(
            {
                "images": gym.spaces.Dict({"camera": gym.spaces.Box(0, 255, (size, size, 3), np.uint8)}),
                "ee_state": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self.cell = self.task = self.steps = 0

    def instruction(self, task: str) -> str:
        return f"walk {task}"

    def num_starts(self, split: Split) -> int:
        return self.config.num_train_starts if split == "train" else self.config.num_eval_starts

    def expert_action(self) -> np.ndarray:
        return np.array([1.0 if self.task == 0 else -1.0, 0.0], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        start = start_option(options)
        self.cell, self.task, self.steps = 3 + start.index % 3, self.tasks.index(start.task), 0
        return self.observe(), {}

    def step(self, action: np.ndarray):
        self.cell += 1 if action[0] >= 0 else -1
        self.steps += 1
        success = self.cell == (LENGTH - 1 if self.task == 0 else 0)
        self.cell = min(max(self.cell, 0), LENGTH - 1)
        truncated = not success and self.steps >= self.config.max_steps
        return self.observe(), float(success), success, truncated, {"success": success}

    def observe(self) -> dict[str, np.ndarray]:
        size = self.config.image_size
        image = np.full((size, size, 3), self.cell + LENGTH * self.task, np.uint8)
        return {"images": {"camera": image}, "ee_state": np.array([self.cell, 0, 0, 1], np.float32)}
