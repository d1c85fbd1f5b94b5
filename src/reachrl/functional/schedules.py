"""Rules by which an algorithm changes its own options from one iteration to the next; pure functions of numbers."""

import math
from typing import Literal

# Of the learning rate it began with: what rsl_rl's bounds of 1e-5 and 1e-2 are of its default of 1e-3.
LEAST_FACTOR, MOST_FACTOR = 0.01, 10.0
_KL_MARGIN, _LR_STEP = 2.0, 1.5


def decay(schedule: Literal["linear", "cosine"], progress: float, final: float) -> float:
    """The factor of a learning rate that falls from 1 to `final`.

    Args:
        schedule: a straight line, or half a period of a cosine.
        progress: 0 at the beginning, 1 at the end.
        final: the factor at the end.

    Source: cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983), eq. 5, without restarts.
    """
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (1 - final) * left


def kl_adapted(factor: float, kl: float, desired: float) -> float:
    """The next factor of a learning rate after an update that moved the policy by `kl`.

    A KL of more than twice the desired one divides the factor by 1.5, one of less than half multiplies it by 1.5, both
    within bounds. A KL of 0, or none at all (NaN), says nothing.

    Source: Schulman et al. 2017 (arXiv 1707.06347), section 4, for the margin; the step as in rsl_rl's and rl_games'
        adaptive schedules.
    """
    if kl > _KL_MARGIN * desired:
        return max(LEAST_FACTOR, factor / _LR_STEP)
    if 0 < kl < desired / _KL_MARGIN:
        return min(MOST_FACTOR, factor * _LR_STEP)
    return factor


def entropy_bonus(bonus: float, entropy: float, *, floor: float, step: float) -> float:
    """The next addition to the weight of the entropy bonus: higher by `step` below `floor`, lower above it, 0 at least.

    Args:
        bonus: the present addition.
        entropy: in nats per action token; NaN (the policy was not trained) changes nothing.
        floor: the entropy to hold.
        step: change of one iteration.

    Source: adaptive entropy control of Skywork Open Reasoner 1 (arXiv 2505.22312), section 5.
    """
    if entropy < floor:
        return bonus + step
    return max(0.0, bonus - step) if entropy >= floor else bonus
