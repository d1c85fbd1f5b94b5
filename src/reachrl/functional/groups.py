"""Advantages of episodes that began alike: each against the others of its group."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

_EPS = 1e-6
_DIFFERS = 1e-6  # returns that are closer than this are the same


def group_advantages(
    returns: Float64[np.ndarray, "E"],
    groups: Int64[np.ndarray, "E"],
    *,
    baseline: Literal["mean", "leave_one_out"],
    divide_by_std: bool,
) -> Float32[np.ndarray, "E"]:
    """Advantage of each episode; 0 in a group of one, which has nothing to compare with.

    Args:
        returns: of the episodes.
        groups: number of the group of each.
        baseline: what is subtracted: the mean of the group, or that of its other episodes.
        divide_by_std: divide by the group's sample standard deviation (plus 1e-6).

    Source: `mean` with the deviation: GRPO (arXiv 2402.03300, section 4.1.2); without it: Dr. GRPO (arXiv 2503.20783,
    section 3.1). `leave_one_out`: RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8; Kool et al. 2019).
    """
    advantages = np.zeros(len(returns))
    for group in np.unique(groups):
        members = groups == group
        count = int(members.sum())
        if count < 2:
            continue
        centred = returns[members] - returns[members].mean()
        if baseline == "leave_one_out":
            centred *= count / (count - 1)
        if divide_by_std:
            centred /= returns[members].std(ddof=1) + _EPS
        advantages[members] = centred
    return advantages.astype(np.float32)


def informative(returns: Float64[np.ndarray, "E"], groups: Int64[np.ndarray, "E"]) -> Bool[np.ndarray, "E"]:
    """Whether an episode's group has episodes of different returns; the others' advantages are all 0.

    Source: dynamic sampling of DAPO (arXiv 2503.14476, section 3.2).
    """
    kept = np.zeros(len(returns), dtype=bool)
    for group in np.unique(groups):
        members = groups == group
        kept[members] = np.ptp(returns[members]) > _DIFFERS
    return kept


def episode_weights(lengths: Int64[np.ndarray, "E"]) -> Float64[np.ndarray, "E"]:
    """Weight of each decision of an episode so that all episodes weigh alike; 1 on average over the decisions.

    Source: the mean over a sequence before the mean over sequences in GRPO's objective (arXiv 2402.03300, eq. 3).
    """
    return lengths.sum() / (len(lengths) * lengths) if len(lengths) else np.zeros(0)
