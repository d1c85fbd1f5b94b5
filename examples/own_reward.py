"""Train with a reward of your own: success, and a price for every decision.

python examples/own_reward.py reward.cost=0.02
"""

import sys
from pathlib import Path

import numpy as np
from pydantic import Field

import reachrl
from reachrl.config.base import Section
from reachrl.rewards.base import Reward
from reachrl.rewards.task import success_reward
from reachrl.types import Rewards, Rollout

RUN = Path("runs/time_cost")


class TimeCostConfig(Section):
    """Success, and a small price for every decision."""

    kind: str = "__main__:TimeCost"
    cost: float = Field(default=0.01, ge=0)


class TimeCost(Reward):
    """Sparse success minus a constant, which prefers short episodes."""

    Config = TimeCostConfig

    def __init__(self, config: TimeCostConfig) -> None:
        self.config = config

    def __call__(self, rollout: Rollout) -> Rewards:
        """Reward every decision of a rollout at once."""
        task = success_reward(rollout)
        # Rows of a lost worker are no data: their reward stays 0.
        time = np.where(rollout.valid, np.float32(-self.config.cost), np.float32(0))
        return Rewards(total=task + time, parts={"task": task, "time": time})


def main() -> None:
    """Train with it; the parts of the reward appear in the metrics and in the report."""
    config = reachrl.load_config("toy", [f"reward.kind={__name__}:TimeCost", *sys.argv[1:]])
    result = reachrl.train(config, RUN)
    for record in result.metrics:
        print(f"iteration {record['iteration']}: task {record['reward/task']:.3f}, time {record['reward/time']:.3f}")


if __name__ == "__main__":
    main()
