"""Quality of a progress model: separation, ordering, calibration and false alarms, as pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrajectory:
    """One trajectory's labels and the model's scores of the same frames; NaN where a frame has no label."""

    task: str
    success: bool
    scores: Float32[np.ndarray, "T+1"]
    labels: Float32[np.ndarray, "T+1"]


def average_ranks(values: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
    """Ranks from 1, equal values sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - 0.5 * (counts - 1))[inverse]


def auc(scores: Float[np.ndarray, "B"], positive: Bool[np.ndarray, "B"]) -> float | None:
    """Probability that a positive scores above a negative, ties counting half.

    Returns:
        A number in [0, 1]; None where one of the classes is absent.

    Source: Mann and Whitney 1947, the rank form of the area under the ROC curve.
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    rank_sum = float(average_ranks(scores)[positive].sum())
    return (rank_sum - 0.5 * num_positive * (num_positive + 1)) / (num_positive * num_negative)


def spearman(a: Float[np.ndarray, "B"], b: Float[np.ndarray, "B"]) -> float | None:
    """Spearman's rank correlation: Pearson's correlation of average ranks.

    Returns:
        A number in [-1, 1]; None where one side is constant.
    """
    if len(a) < 2:
        return None
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None


def reliability(
    scores: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], num_bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Reliability diagram and expected calibration error over equal-width bins.

    Args:
        scores: predicted probabilities in [0, 1].
        labels: targets in [0, 1].
        num_bins: bins; a score of exactly 1 falls into the last.

    Returns:
        The non-empty bins (`low`, `high`, `n`, `mean_score`, `mean_label`) and the error: the mean gap
        between score and label, weighted by the frames in each bin.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    which = np.minimum((scores * num_bins).astype(np.int64), num_bins - 1)
    bins: list[dict[str, float]] = []
    error = 0.0
    for index in range(num_bins):
        inside = which == index
        count = int(inside.sum())
        if count == 0:
            continue
        mean_score, mean_label = float(scores[inside].mean()), float(labels[inside].mean())
        error += count / len(scores) * abs(mean_score - mean_label)
        bins.append(
            {
                "low": index / num_bins,
                "high": (index + 1) / num_bins,
                "n": count,
                "mean_score": mean_score,
                "mean_label": mean_label,
            }
        )
    return bins, error


def binary_cross_entropy(scores: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"]) -> float:
    """Mean cross-entropy in nats of probabilities against soft labels."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1.0 - 1e-7)
    return float(-(labels * np.log(p) + (1.0 - labels) * np.log1p(-p)).mean())


def measure(trajectories: Sequence[ScoredTrajectory]) -> dict[str, Any]:
    """Every quality figure of a set of trajectories; None where the set cannot tell.

    `auc` compares the last frames of successes and failures; `auc_frame` all labelled frames of at least one
    half against the others; `rank_correlation` is Spearman's of score and time, the mean over successes;
    `accuracy` agrees with the label about one half, `false_positive_rate` is the share of failures' frames
    scored at least one half and `false_alarm_rate` the share of failures with any such frame.
    """
    failures = [item for item in trajectories if not item.success]
    successes = [item for item in trajectories if item.success]
    result: dict[str, Any] = {"successes": len(successes), "failures": len(failures), "frames": 0}
    if not trajectories:
        return result | dict.fromkeys(("auc", "rank_correlation")) | _against_labels(np.empty(0), np.empty(0))
    every_label = np.concatenate([item.labels for item in trajectories])
    labelled = np.isfinite(every_label)
    scores, labels = np.concatenate([item.scores for item in trajectories])[labelled], every_label[labelled]
    orders = [spearman(item.scores, np.arange(len(item.scores), dtype=np.float64)) for item in successes]
    known_orders = [order for order in orders if order is not None]
    result.update(
        frames=len(scores),
        auc=auc(np.array([item.scores[-1] for item in trajectories]), np.array([t.success for t in trajectories])),
        rank_correlation=float(np.mean(known_orders)) if known_orders else None,
        false_positive_rate=float(np.mean(np.concatenate([f.scores for f in failures]) >= 0.5)) if failures else None,
        false_alarm_rate=float(np.mean([f.scores.max() >= 0.5 for f in failures])) if failures else None,
    )
    return result | _against_labels(scores, labels)


def _against_labels(scores: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"]) -> dict[str, Any]:
    """The figures that compare frames with their labels; None without a label."""
    if len(labels) == 0:
        keys = ("loss", "accuracy", "majority_accuracy", "auc_frame", "calibration_error")
        return dict.fromkeys(keys) | {"reliability": []}
    bins, error = reliability(scores, labels)
    return {
        "loss": binary_cross_entropy(scores, labels),
        "accuracy": float(((scores >= 0.5) == (labels >= 0.5)).mean()),
        "majority_accuracy": float(max((labels >= 0.5).mean(), (labels < 0.5).mean())),
        "auc_frame": auc(scores, labels >= 0.5),
        "calibration_error": error,
        "reliability": bins,
    }
