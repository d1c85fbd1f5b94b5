"""A toy environment with two cameras and a state, in a file of its own: workers import it without torch."""

from typing import Literal

import gymnasium as gym
import numpy as np

from reachrl.testing.envs import ReachConfig, ReachEnv


class TwoEyedConfig(ReachConfig):
    kind: Literal["two_eyed_env:TwoEyed"] = "two_eyed_env:TwoEyed"  # pyright: ignore
    nan_from: int = 100  # decision whose state is NaN


class TwoEyed(ReachEnv):
    """`front` is what the toy shows; `back`, at half the size, its negative; the state is twice x, y and z."""

    Config = TwoEyedConfig
    control_hz = 12.5

    def __init__(self, config):
        super().__init__(config)
        front, back = ((size, size, 3) for size in (config.image_size, config.image_size // 2))
        self.observation_space = gym.spaces.Dict(
            {
                "images": gym.spaces.Dict(
                    [
                        ("front", gym.spaces.Box(0, 255, front, np.uint8)),
                        ("back", gym.spaces.Box(0, 255, back, np.uint8)),
                    ]
                ),
                "ee_state": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
                "state": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
            }
        )

    def _observe(self):
        seen = super()._observe()
        front = seen["images"]["camera"]
        state = 2 * seen["ee_state"][:3] * (np.nan if self._steps >= self.config.nan_from else 1)
        return seen | {"images": {"back": 255 - front[::2, ::2], "front": front}, "state": state}
