"""What the loop asks of a reward: one call that scores a whole rollout."""

from typing import Protocol

from reachrl.types import Rewards, Rollout


class Reward(Protocol):
    """Turns a rollout into the reward of each step.

    The result is finite f32[T N]; `parts` sum to `total`; rows with `valid == False` are 0; and a row's
    reward does not depend on which other environments were collected beside it.
    `reachrl.testing.rewards.check_reward` proves all of it for any implementation.
    """

    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every step of `rollout`."""
        ...
