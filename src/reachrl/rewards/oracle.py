"""Task success plus the simulator's own progress: the reward of a perfect reward model, in simulation only."""

from typing import ClassVar

import numpy as np

from reachrl.config.reward import OracleRewardConfig
from reachrl.errors import ExtensionError
from reachrl.rewards.base import Reward
from reachrl.rewards.shaping import potential_difference, terminal_steps
from reachrl.rewards.task import success_reward
from reachrl.types import Rewards, Rollout


class OracleReward(Reward):
    """Potential-based shaping with the progress that the simulator reports.

    Args:
        config: the weight.
        gamma: the learner's discount.
        bootstrap_truncated: the learner's; where it treats a time limit as terminal, so must the potential.
    """

    Config: ClassVar[type[OracleRewardConfig]] = OracleRewardConfig

    def __init__(self, config: OracleRewardConfig, *, gamma: float, bootstrap_truncated: bool = True) -> None:
        self.config, self.gamma, self.bootstrap_truncated = config, gamma, bootstrap_truncated

    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every decision of `rollout`.

        Raises:
            ExtensionError: the environment reports no progress.
        """
        if np.isnan(rollout.progress[rollout.valid]).any():
            raise ExtensionError(
                'reward.kind=oracle needs an environment that reports info["progress"] in [0, 1] after reset and step; '
                "this one does not. Use `reward.kind=process` or `task`, or let the environment report it."
            )
        task = success_reward(rollout, gamma=self.gamma)
        terminal = terminal_steps(rollout, bootstrap_truncated=self.bootstrap_truncated)
        before, after = np.moveaxis(np.where(rollout.valid[..., None], rollout.progress, np.float32(0)), -1, 0)
        difference = potential_difference(before, after, terminal, rollout.executed, gamma=self.gamma)
        process = np.float32(self.config.weight) * difference
        return Rewards(total=task + process, parts={"task": task, "process": process}, progress=after)
