"""The simulator's success as reward: 1 on the control step that succeeds, 0 elsewhere."""

from typing import ClassVar

import numpy as np
from jaxtyping import Float32

from reachrl.config.reward import TaskRewardConfig
from reachrl.functional.discount import discounts
from reachrl.rewards.base import Reward
from reachrl.types import Rewards, Rollout


def success_reward(rollout: Rollout, *, gamma: float = 1.0) -> Float32[np.ndarray, "T N"]:
    """The sparse part every reward shares: 1 where a valid decision succeeded, discounted to its beginning.

    Args:
        rollout: what was collected.
        gamma: the learner's discount of a control step. The success comes with the last one of a chunk: where chunks
            hold one action, it does not matter.
    """
    waiting = discounts(gamma, np.maximum(rollout.executed - 1, 0)).astype(np.float32)
    return (rollout.success & rollout.valid) * waiting


class TaskReward(Reward):
    """Sparse success, and nothing else.

    Args:
        config: its section.
        gamma: the learner's discount; it matters inside chunks of actions alone.
    """

    Config: ClassVar[type[TaskRewardConfig]] = TaskRewardConfig

    def __init__(self, config: TaskRewardConfig | None = None, *, gamma: float = 1.0) -> None:
        self.config, self.gamma = config or TaskRewardConfig(), gamma

    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every decision of `rollout`."""
        task = success_reward(rollout, gamma=self.gamma)
        return Rewards(total=task.copy(), parts={"task": task})
