"""Actions as tokens: 256 bins over [-1, 1], the last 256 rows of the vocabulary, and un-normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from reachrl.config.policy import NUM_ACTION_BINS

Vector = np.ndarray | Sequence[float]
Mask = np.ndarray | Sequence[bool]

_EDGES = np.linspace(-1.0, 1.0, NUM_ACTION_BINS)
_CENTRES = (_EDGES[:-1] + _EDGES[1:]) / 2.0


def tokens_from_unit(actions: Float[np.ndarray, "*B"], vocab_end: int) -> Int[np.ndarray, "*B"]:
    """Map normalised actions to vocabulary ids.

    -1 becomes `vocab_end - 1` and +1 becomes `vocab_end - 256`: larger actions have smaller ids.

    Args:
        actions: normalised to [-1, 1]; values outside are clipped.
        vocab_end: one past the last action token (32000 for OpenVLA).

    Returns:
        Vocabulary ids of the same shape.

    Source: Kim et al. 2024, OpenVLA, section 3.2, and its released `ActionTokenizer`.
    """
    return vocab_end - np.digitize(np.clip(actions, -1.0, 1.0), _EDGES)


def unit_from_tokens(token_ids: Int[np.ndarray, "*B"], vocab_end: int) -> Float[np.ndarray, "*B"]:
    """Map vocabulary ids to the centres of their bins.

    256 tokens share 255 centres: the two lowest ids decode to the same action, as in the release.

    Args:
        token_ids: vocabulary ids.
        vocab_end: one past the last action token.

    Returns:
        f64 normalised actions in (-1, 1).
    """
    return _CENTRES[np.clip(vocab_end - token_ids - 1, 0, NUM_ACTION_BINS - 2)]


@dataclass(frozen=True, slots=True)
class ActionStats:
    """1 % and 99 % quantiles of the training actions; unmasked dimensions pass through unchanged."""

    q01: Float[np.ndarray, "D"]
    q99: Float[np.ndarray, "D"]
    mask: Bool[np.ndarray, "D"]

    @classmethod
    def create(cls, q01: Vector, q99: Vector, mask: Mask) -> "ActionStats":
        """Copy vectors into f64 quantiles and a boolean mask.

        Raises:
            ValueError: the lengths differ, or a quantile is not finite.
        """
        low, high, moves = np.array(q01, np.float64), np.array(q99, np.float64), np.array(mask, np.bool_)
        if not low.shape == high.shape == moves.shape or low.ndim != 1:
            raise ValueError(f"q01 {low.shape}, q99 {high.shape} and mask {moves.shape} must be vectors of one length")
        if not np.all(np.isfinite(low)) or not np.all(np.isfinite(high)):
            raise ValueError("the action quantiles are not finite")
        return cls(low, high, moves)

    @classmethod
    def identity(cls, num_dims: int) -> "ActionStats":
        """Statistics that leave actions in [-1, 1] as they are."""
        return cls(-np.ones(num_dims), np.ones(num_dims), np.ones(num_dims, np.bool_))

    def unnormalise(self, unit: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
        """Map [-1, 1] to the environment's units: 0.5 (a + 1) (q99 - q01) + q01 where masked."""
        return np.where(self.mask, 0.5 * (unit + 1) * (self.q99 - self.q01) + self.q01, unit)

    def normalise(self, actions: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
        """Invert `unnormalise`; a dimension that never moved maps to 0."""
        span = self.q99 - self.q01
        moved = span > 0
        unit = np.where(moved, 2.0 * (actions - self.q01) / np.where(moved, span, 1.0) - 1.0, 0.0)
        return np.where(self.mask, unit, actions)
