"""The interface of a reward: one call that scores a whole rollout."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from reachrl.errors import ExtensionError
from reachrl.types import Rewards, Rollout


class Reward(ABC):
    """Turns a rollout into the reward of each decision.

    A decision may be a chunk of actions (`rollout.executed` says how many were carried out), and its reward is seen
    from its beginning: what comes with the k-th action counts `gamma ** (k - 1)` times (see
    `reachrl.functional.discount`). Frames are seen before and after a chunk, not inside.

    The result is finite f32[T N]; `parts` sum to `total`; rows with `valid == False` are 0; and a row's
    reward does not depend on which other environments were collected beside it.
    `reachrl.testing.rewards.check_reward` proves all of it for any implementation.

    Episodes run on from one rollout into the next. Rollouts are scored in the order of their collection, so a reward
    may keep what it needs of an episode's beginning, in its state too; `check_borders` proves of a potential that it
    telescopes over the borders.

    A reward that changes over a run, because it learns or normalises, keeps what it needs to continue in its
    state; for one that does neither, the methods below are right as they are.
    """

    @abstractmethod
    def __call__(self, rollout: Rollout) -> Rewards:
        """Score every decision of `rollout`."""

    def adapt(self, rollout: Rollout, *, iteration: int) -> dict[str, float]:
        """Learn from the rollout that an iteration has just used; returns figures for its metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (nothing to do is a good answer)
        """Restore what `state_dict` returned."""


def check_finite(rewards: Rewards, rollout: Rollout, whose: str) -> None:
    """Check that rewards are finite: a NaN would spread to every advantage of the batch.

    Args:
        rewards: of the rollout's steps.
        rollout: what they were given for.
        whose: the reward's name, for the message.

    Raises:
        ExtensionError: names the first step of the rollout, its environment and what was asked for there.
    """
    for part, values in {"the reward": rewards.total, **rewards.parts}.items():
        if not np.isfinite(values).all():
            t, n = np.argwhere(~np.isfinite(values))[0].tolist()
            raise ExtensionError(
                f"{whose}: {part} is {values[t, n]} in step {t} of the rollout in environment {n} "
                f"({rollout.instructions[t][n]!r}); expected finite numbers. Fix the reward; nothing was "
                "trained on it."
            )
