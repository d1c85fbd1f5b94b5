"""Actions as tokens of 256 bins, in the units that the statistics of the training actions give them."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from reachrl.config.policy import PrismaticConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.action_tokens import tokens_from_unit, unit_from_tokens
from reachrl.policies.base import Policy
from reachrl.policies.storage.saved import SavedPolicy


class BinnedActions(Policy):
    """Each token is a bin of one dimension between the quantiles of the training actions."""

    config: PrismaticConfig
    _action_stats: ActionStats | tuple[str, ...]
    """Statistics; or the names to choose from, until one is chosen."""
    stats_name: str | None = None
    """What the checkpoint calls its statistics; None: they were chosen or fitted here."""

    @property
    def has_mean(self) -> bool:
        """Whether tokens are chosen from the bins alone."""
        return not self.config.all_tokens

    @property
    def action_stats(self) -> ActionStats:
        """What maps actions to the environment's units.

        Raises:
            CheckpointError: the checkpoint holds several, and none was named or set.
        """
        if isinstance(self._action_stats, tuple):
            raise CheckpointError(
                f"{self.config.checkpoint} has {len(self._action_stats)} sets of action statistics "
                f"({list(self._action_stats)}), and the wrong one would move the robot by wrong amounts: name the one "
                "for your robot with policy.dataset=NAME (--dataset NAME of `reachrl model verify`)"
            )
        return self._action_stats

    def _take_stats(self, saved: SavedPolicy[PrismaticConfig]) -> None:
        stats = saved.stats
        if isinstance(stats, ActionStats):
            self.set_action_stats(stats.q01, stats.q99, stats.mask)
            self.stats_name = saved.stats_name
        elif stats:
            self._action_stats = stats

    def decode_actions(
        self, token_ids: Int64[Tensor, "B A"], token_mask: Bool[Tensor, "B A"] | None = None
    ) -> Float[np.ndarray, "B H D"]:
        """Map action tokens to actions f32[B H D] in the environment's units."""
        return self.action_stats.unnormalise(self.unit_actions(token_ids)).astype(np.float32)

    def action_limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The ends of the statistics' range; of a dimension that passes through nothing is known."""
        if isinstance(self._action_stats, tuple):
            return None
        stats = self.action_stats
        ones = np.ones(len(stats.q01))
        low, high = stats.unnormalise(-ones), stats.unnormalise(ones)
        return low, np.where(stats.mask & (stats.q01 < stats.q99), high, low)

    def unit_actions(self, token_ids: Int64[Tensor, "B A"]) -> Float[np.ndarray, "B H D"]:
        """Map action tokens, action by action, to normalised actions f64[B H D] in (-1, 1)."""
        unit = unit_from_tokens(token_ids.cpu().numpy(), self.config.language_model.vocab_end)
        return unit.reshape(len(unit), self.num_actions, self.config.num_action_tokens)

    def encode_actions(self, actions: Float[np.ndarray, "B H D"]) -> tuple[Int64[Tensor, "B A"], Bool[Tensor, "B A"]]:
        """Map actions f32[B H D] in the environment's units to the nearest action tokens, which fill every slot."""
        unit = self.action_stats.normalise(np.asarray(actions, np.float64))
        tokens = tokens_from_unit(unit, self.config.language_model.vocab_end).reshape(len(unit), -1)
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Fix the un-normalisation: f64[D] quantiles of the training actions; unmasked dims pass through.

        Raises:
            ConfigError: the vectors do not have one entry per action token.
        """
        stats = ActionStats.create(q01, q99, mask)
        if len(stats.q01) != self.config.num_action_tokens:
            raise ConfigError(
                f"policy.num_action_tokens = {self.config.num_action_tokens}, but actions have {len(stats.q01)} "
                f"dimensions; expected one token each. Set policy.num_action_tokens={len(stats.q01)}"
            )
        self._action_stats, self.stats_name = stats, None
