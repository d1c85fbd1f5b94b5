"""PPO: generalised advantages, a critic, and iterations that train the critic alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from reachrl.algorithms.base import Batch, decisions, valid_rows
from reachrl.algorithms.policy_gradient import PolicyGradient
from reachrl.config.ppo import PPOConfig
from reachrl.functional.gae import gae
from reachrl.functional.ppo import value_loss
from reachrl.functional.stats import explained_variance
from reachrl.policies.base import Policy
from reachrl.types import Rewards, Rollout, Scored


class PPO(PolicyGradient):
    """Owns the optimiser of policy and critic.

    Source: Schulman et al. 2017 (arXiv 1707.06347).
    """

    Config: ClassVar[type[PPOConfig]] = PPOConfig
    config: PPOConfig

    def __init__(self, config: PPOConfig, policy: Policy, *, seed: int, temperature: float) -> None:
        super().__init__(config, policy, seed=seed, temperature=temperature)
        self.warming_up = config.warmup_iterations > 0 or config.warmup_explained_variance is not None
        """Whether the next update trains the critic only."""

    def batch(self, rollout: Rollout, rewards: Rewards, scored: Scored) -> Batch:
        """Advantages and returns of every valid decision."""
        assert scored.values is not None and scored.final_values is not None
        advantages, returns = gae(
            rewards.total,
            scored.values,
            scored.final_values,
            rollout.terminated,
            rollout.truncated,
            rollout.valid,
            rollout.executed,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
            bootstrap_truncated=self.config.bootstrap_truncated,
        )
        credit = {"advantages": advantages, "returns": returns, "old_values": scored.values[:-1]}
        return Batch(**decisions(rollout, scored, valid_rows(rollout), **credit))

    def update(self, batch: Batch, *, iteration: int) -> dict[str, float]:
        """Train on one iteration's batch; during warm-up the critic alone.

        `explained_variance` is that of the old values.
        """
        assert batch.old_values is not None and batch.returns is not None
        warming_up = self.warming_up
        stats = super().update(replace(batch, advantages=self._normalized(batch.advantages)), iteration=iteration)
        variance = math.nan
        if len(batch.rows):
            variance = explained_variance(batch.old_values.numpy(), batch.returns.numpy())
        self.warming_up = self._still_warming_up(iteration + 1, variance)
        return stats | {"explained_variance": variance, "warming_up": warming_up}

    def state_dict(self) -> dict[str, Any]:
        """How many iterations moved the policy, and whether the next one does."""
        return super().state_dict() | {"warming_up": self.warming_up}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        super().load_state_dict(state)
        self.warming_up = bool(state["warming_up"])

    def _still_warming_up(self, done: int, variance: float) -> bool:
        """Whether iteration `done` trains the critic only.

        Warm-up lasts `warmup_iterations`, then on until the critic explains enough of the returns' variance, but
        not beyond `warmup_max_iterations`; once over, it never returns.
        """
        config = self.config
        if not self.warming_up or done < config.warmup_iterations:
            return self.warming_up
        target = config.warmup_explained_variance
        # An iteration without data explains nothing (NaN): no reason to end.
        return target is not None and not variance >= target and done < config.warmup_max_iterations

    def _trains_policy(self) -> bool:
        return not self.warming_up

    @property
    def _critic_epochs(self) -> int | None:
        return self.config.value_epochs

    def _value_learning_rates(self) -> Sequence[float]:
        return (self.config.value_lr,)

    def _normalized(self, advantages: Tensor) -> Tensor:
        # Over the whole batch of the iteration: per micro-batch would make memory settings part of the algorithm.
        if not self.config.normalize_advantages or len(advantages) < 2:
            return advantages
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def _critic_loss(self, values: Tensor, batch: Batch, rows: Tensor) -> tuple[Tensor, float]:
        assert batch.old_values is not None and batch.returns is not None
        old_values, returns = (each[rows].to(values.device) for each in (batch.old_values, batch.returns))
        config = self.config
        error = value_loss(values, old_values, returns, kind=config.value_loss, clip=config.value_clip)
        return error.mean(), config.value_coef
