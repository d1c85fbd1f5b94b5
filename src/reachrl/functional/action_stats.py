"""Statistics of recorded actions: what maps the environment's units to [-1, 1] and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

Vector = np.ndarray | Sequence[float]
Mask = np.ndarray | Sequence[bool]

_AT_LIMIT = 0.02  # share of an action's range from its end within which its mean counts as lying at the limit
_SAME = 1e-6  # quantiles closer than this span nothing that 255 bins could divide


@dataclass(frozen=True, slots=True)
class ActionStats:
    """1 % and 99 % quantiles of the training actions; unmasked dimensions pass through unchanged."""

    q01: Float64[np.ndarray, "D"]
    q99: Float64[np.ndarray, "D"]
    mask: Bool[np.ndarray, "D"]
    epsilon: float = 0.0  # added to the span between them, as OpenVLA-OFT does

    @classmethod
    def create(cls, q01: Vector, q99: Vector, mask: Mask, *, epsilon: float = 0.0) -> "ActionStats":
        """Copy vectors into f64 quantiles and a boolean mask.

        Raises:
            ValueError: the lengths differ, a quantile is not finite, a lower one is above its upper one, or the mask
                holds something else than booleans.
        """
        low, high, moves = np.array(q01, np.float64), np.array(q99, np.float64), np.array(mask)
        if moves.dtype.kind not in "biu" or not np.isin(moves, (0, 1)).all():
            raise ValueError(f"mask {moves.tolist()} must be booleans")  # of words, "false" too would be true
        moves = moves.astype(np.bool_)
        if not low.shape == high.shape == moves.shape or low.ndim != 1:
            raise ValueError(f"q01 {low.shape}, q99 {high.shape} and mask {moves.shape} must be vectors of one length")
        if not np.all(np.abs([low, high, high - low]) <= np.finfo(np.float32).max):  # actions are float32
            raise ValueError("the action quantiles are not finite")
        if crossed := np.flatnonzero(low > high).tolist():
            where = crossed[0]
            raise ValueError(f"q01 {low[where]:g} of dimension {where} is above its q99 {high[where]:g}")
        return cls(low, high, moves, epsilon)

    @classmethod
    def identity(cls, num_dims: int) -> "ActionStats":
        """Statistics that leave actions in [-1, 1] as they are."""
        return cls(-np.ones(num_dims), np.ones(num_dims), np.ones(num_dims, np.bool_))

    @classmethod
    def of_actions(cls, actions: Float[np.ndarray, "S D"]) -> "ActionStats":
        """The 1 % and 99 % quantiles of each dimension of S actions (linear interpolation, as numpy's default).

        Where the quantiles coincide, minimum and maximum take their place: a dimension that rarely moves keeps its
        whole range, and one that never moves decodes to its constant exactly, whatever the token. No dimension
        passes through.

        Raises:
            ValueError: there is no action, or one is not finite; names the first by row and dimension.
        """
        values = np.asarray(actions, np.float64)
        if len(values) == 0:
            raise ValueError("statistics of no actions at all")
        if not np.isfinite(values).all():
            row, dimension = np.argwhere(~np.isfinite(values))[0].tolist()
            raise ValueError(f"action {row} is {values[row, dimension]} in dimension {dimension}; expected numbers")
        q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
        # Of recorded numbers: interpolated ones differ by a sliver of a move where moves are just 1 step in 100.
        inner = np.quantile(values, 0.99, axis=0, method="lower") - np.quantile(values, 0.01, axis=0, method="higher")
        same = inner <= _SAME
        q01[same], q99[same] = values.min(axis=0)[same], values.max(axis=0)[same]
        return cls(q01, q99, np.ones(len(q01), np.bool_))

    def unnormalise(self, unit: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
        """Map [-1, 1] to the environment's units: 0.5 (a + 1) (q99 - q01 + epsilon) + q01 where masked.

        Source: Kim et al. 2024, OpenVLA, `predict_action`; where q01 equals q99 every action is that constant.
        """
        return np.where(self.mask, 0.5 * (unit + 1) * (self.q99 - self.q01 + self.epsilon) + self.q01, unit)

    def normalise(self, actions: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
        """Invert `unnormalise`; a dimension that never moved maps to 0.

        What lies beyond a quantile maps beyond [-1, 1], where tokens are clipped.

        Raises:
            ValueError: an action is not finite, or lies outside [-1, 1] in a dimension that passes through.
        """
        if not np.isfinite(actions).all():
            place = np.argwhere(~np.isfinite(actions))[0].tolist()
            raise ValueError(f"the action at {place} is {actions[tuple(place)]}; expected finite numbers")
        outside = ~self.mask & (np.abs(actions) > 1)
        if outside.any():
            place = np.argwhere(outside)[0].tolist()
            raise ValueError(
                f"the action at {place} is {actions[tuple(place)]:g} in a dimension without statistics (mask false), "
                "which passes through unchanged; expected -1 to 1 there"
            )
        span = self.q99 - self.q01
        moved = span > 0
        unit = np.where(moved, 2.0 * (actions - self.q01) / np.where(moved, span + self.epsilon, 1.0) - 1.0, 0.0)
        return np.where(self.mask, unit, actions)


def at_limits(actions: Float[np.ndarray, "N D"], low: Float[np.ndarray, "D"], high: Float[np.ndarray, "D"]) -> str:
    """Dimensions in which the mean of N actions lies within 2 % of the range from `low` or `high`, in words; "": none.

    Dimensions that cannot vary (`low` equals `high`) are left out.
    """
    span = high - low
    means = np.asarray(actions, np.float64).mean(axis=0)
    near = np.minimum(means - low, high - means) <= _AT_LIMIT * span
    return ", ".join(
        f"dimension {d} (mean {means[d]:.3g}, limits {low[d]:.3g} and {high[d]:.3g})"
        for d in np.flatnonzero(near & (span > 0))
    )


def means_of(offered: Float[np.ndarray, "N C K D"], known: Bool[np.ndarray, "N C"]) -> Float[np.ndarray, "N K D"]:
    """Average each row's candidate actions.

    Args:
        offered: `C` candidates of each row.
        known: which of them count; where none does, all do.

    Returns:
        Their mean, in the dtype of the candidates.
    """
    weights = (known | ~known.any(axis=1, keepdims=True))[..., None, None].astype(np.float64)
    return ((offered * weights).sum(axis=1) / weights.sum(axis=1)).astype(offered.dtype)
