"""GRPO and leave-one-out: episodes of one start compared with one another, without a critic."""

from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from reachrl.algorithms.base import Batch, decisions
from reachrl.algorithms.policy_gradient import PolicyGradient
from reachrl.config.grpo import GroupSection, GRPOConfig, RLOOConfig
from reachrl.functional.groups import episode_weights, group_advantages, informative
from reachrl.types import Rewards, Rollout, Scored


class _Grouped(PolicyGradient):
    """Makes batches from groups of whole episodes."""

    config: GroupSection

    @classmethod
    def wants_more(cls, config: Any, rollout: Rollout, rewards: Rewards, *, rollouts: int) -> bool:
        """Whether fewer groups differ in their returns than one rollout has."""
        returns, groups, _ = _worth(config, rollout, rewards)
        kept = informative(returns, groups)
        return len(np.unique(groups[kept])) * rollouts < len(np.unique(groups))

    def advantages(self, returns: Float64[np.ndarray, "E"], groups: Int64[np.ndarray, "E"]) -> Float32[np.ndarray, "E"]:
        """One for each episode."""
        raise NotImplementedError

    def batch(self, rollout: Rollout, rewards: Rewards, scored: Scored) -> Batch:
        """Every decision of an episode gets the episode's advantage; groups of equal returns are left out."""
        returns, groups, spans = _worth(self.config, rollout, rewards)
        kept = informative(returns, groups)
        advantages, weights = np.zeros(rollout.valid.shape, np.float32), np.ones(rollout.valid.shape, np.float32)
        chosen = np.zeros(rollout.valid.shape, dtype=bool)
        per_episode = self.advantages(returns, groups)
        lengths = np.array([last + 1 - first for first, last, _ in spans], dtype=np.int64)
        shares = np.ones(len(spans))
        if self.config.length_weight == "episode":
            shares[kept] = episode_weights(lengths[kept])
        for place in np.flatnonzero(kept):
            first, last, n = spans[place]
            rows = (slice(first, last + 1), n)
            advantages[rows], weights[rows], chosen[rows] = per_episode[place], shares[place], True
        credit = {"advantages": advantages} | ({"weights": weights} if self.config.length_weight == "episode" else {})
        stats = {
            "groups": len(np.unique(groups)),
            "filtered_groups": len(np.unique(groups[~kept])),
            "return_mean": float(returns.mean()) if len(returns) else float("nan"),
        }
        return Batch(
            **decisions(rollout, scored, torch.from_numpy(np.flatnonzero(chosen & rollout.valid)), **credit),
            stats=stats,
        )


class GRPO(_Grouped):
    """Advantage: return minus the group's mean, divided by its standard deviation unless configured otherwise.

    Source: DeepSeekMath (arXiv 2402.03300); without the deviation: Dr. GRPO (arXiv 2503.20783).
    """

    Config: ClassVar[type[GRPOConfig]] = GRPOConfig
    config: GRPOConfig

    def advantages(self, returns: Float64[np.ndarray, "E"], groups: Int64[np.ndarray, "E"]) -> Float32[np.ndarray, "E"]:
        """Against the mean of the group."""
        return group_advantages(returns, groups, baseline="mean", divide_by_std=self.config.divide_by_std)


class RLOO(_Grouped):
    """Advantage: return minus the mean of the group's other episodes.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740).
    """

    Config: ClassVar[type[RLOOConfig]] = RLOOConfig
    config: RLOOConfig

    def advantages(self, returns: Float64[np.ndarray, "E"], groups: Int64[np.ndarray, "E"]) -> Float32[np.ndarray, "E"]:
        """Against the mean of the others."""
        return group_advantages(returns, groups, baseline="leave_one_out", divide_by_std=False)


def _worth(
    config: GroupSection, rollout: Rollout, rewards: Rewards
) -> tuple[Float64[np.ndarray, "E"], Int64[np.ndarray, "E"], list[tuple[int, int, int]]]:
    """Return, group and (first row, last row, environment) of every episode of the rollout."""
    returns, groups, spans = list[float](), list[int](), list[tuple[int, int, int]]()
    for (t, n), episode in zip(rollout.final_rows.tolist(), rollout.episodes, strict=True):
        assert episode.group is not None, "the collector numbers the groups of whole episodes"
        first = t + 1 - episode.num_decisions
        earned = float(rewards.total[first : t + 1, n].astype(np.float64).sum())
        returns.append(earned if config.returns == "sum" else float(episode.success))
        groups.append(episode.group)
        spans.append((first, t, n))
    return np.array(returns, np.float64), np.array(groups, np.int64), spans
