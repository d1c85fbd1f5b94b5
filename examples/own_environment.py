"""Train on an environment of your own, defined in the very script (or notebook) that trains.

    python examples/own_environment.py

The class is sent to the processes that environments run in; nothing needs to be installed.
"""

import sys
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np

import reachrl
from reachrl.config.env import EnvSection
from reachrl.envs.base import Env, check_start, observed, start_key, start_option

RUN = Path("runs/slider")


class SliderConfig(EnvSection):
    """A white bar on a rail that must be pushed to one end."""

    tasks: tuple[Literal["left", "right"], ...] = ("left", "right")
    image_size: int = 24
    max_steps: int = 12
    num_envs: int = 4


class Slider(Env):
    """One degree of freedom; the other three action dimensions do nothing."""

    Config = SliderConfig

    def __init__(self, config: SliderConfig) -> None:
        self.config, self.tasks = config, config.tasks
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = observed(["camera"], config.image_size)

    def instruction(self, task):
        """What the policy is asked."""
        return f"push the bar to the {task} end"

    def reset(self, *, seed=None, options=None):
        """Begin a numbered start: all randomness comes from its number."""
        start = start_option(options)
        check_start(self, start)
        self._x = np.random.default_rng(start_key(start)).uniform(0.3, 0.7)
        self._goal, self._steps = float(start.task == "right"), 0
        return self._observe(), {"success": False}

    def step(self, action):
        """Push."""
        self._x = float(np.clip(self._x + 0.1 * np.clip(action[0], -1, 1), 0, 1))
        self._steps += 1
        success = abs(self._x - self._goal) < 0.1
        truncated = not success and self._steps >= self.config.max_steps  # never both
        return self._observe(), float(success), success, truncated, {"success": success}

    def expert_action(self):
        """Demonstrate, for the warm start."""
        return np.array([np.sign(self._goal - self._x), 0, 0, 0], np.float32)

    def _observe(self):
        side = self.config.image_size
        image = np.zeros((side, side, 3), np.uint8)
        distance = np.abs(np.arange(side) - self._x * (side - 1))
        image[side // 3 : 2 * side // 3] = (255 * np.clip(2.5 - distance, 0, 1)).astype(np.uint8)[:, None]
        return {"images": {"camera": image}, "ee_state": np.array([self._x, 0, 0, 1], np.float32)}


def main() -> None:
    """Train on it; then print success before and after."""
    config = reachrl.load_config("toy", [f"env.kind={__name__}:Slider", *sys.argv[1:]])
    result = reachrl.train(config, RUN)
    print(f"before {result.before['sampled'].success}, after {result.after['sampled'].success}")


if __name__ == "__main__":
    main()
