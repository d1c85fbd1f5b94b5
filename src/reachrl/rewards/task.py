"""The simulator's success as reward: 1 on the step that succeeds, 0 elsewhere."""

from typing import ClassVar

import numpy as np
from jaxtyping import Float32

from reachrl.config.reward import TaskRewardConfig
from reachrl.rewards.base import Reward
from reachrl.types import Rewards, Rollout


def success_reward(rollout: Rollout) -> Float32[np.ndarray, "T N"]:
    """The sparse part every reward shares: 1.0 where a valid step succeeded."""
    return (rollout.success & rollout.valid).astype(np.float32)


class TaskReward(Reward):
    """Sparse success, and nothing else."""

    Config: ClassVar[type[TaskRewardConfig]] = TaskRewardConfig

    def __init__(self, config: TaskRewardConfig | None = None) -> None:
        self.config = config or TaskRewardConfig()

    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every step of `rollout`."""
        task = success_reward(rollout)
        return Rewards(total=task.copy(), parts={"task": task})
