"""Statistics of success rates: Wilson intervals, paired tests, intervals over seeds; explained variance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(k: int | float, n: int | float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a success rate of `k` in `n`; (0, 1) when nothing was tried.

    Pooled rates give counts that are not whole.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson needs 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of one figure over independently seeded runs with its 95 % Student t interval: (mean, low, high).

    A Wilson interval over the pooled episodes of several runs holds the luck of the episodes only: those of one run
    share a policy, so what is claimed of the method rests on as many observations as there are runs. For a comparison,
    take the differences of runs that share a seed.

    Args:
        values: one for each run; with fewer than two there is no interval, and its ends are infinite.

    Source: Student 1908, The probable error of a mean.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _t95(n - 1) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def _t95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the angle's interval down to rounding
        angle = (low + high) / 2
        low, high = (angle, high) if _t_within(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _t_within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)) of Student's t.

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cosine**2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def weighted_rate(outcomes: Sequence[bool], weights: Sequence[float]) -> tuple[float, float]:
    """Self-normalised weighted mean of `outcomes`, and the number of equally weighted ones that would be as precise.

    Args:
        outcomes: at least one.
        weights: positive; with 1 / (n p) for an outcome drawn with probability p out of n, the mean is that of a
            uniform draw.

    Source: Kish 1965, Survey Sampling: the effective sample size (sum w)^2 / sum w^2.
    """
    total = math.fsum(weights)
    rate = math.fsum(weight for outcome, weight in zip(outcomes, weights, strict=True) if outcome) / total
    return rate, total**2 / math.fsum(weight**2 for weight in weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Outcomes that changed between two policies on the same start states."""

    improved: int
    worsened: int
    p_value: float


def paired_test(before: list[bool], after: list[bool]) -> PairedTest:
    """Exact two-sided McNemar test on the same episodes before and after.

    Under no change a discordant pair is equally likely to improve or to worsen.

    Source: McNemar 1947; exact binomial form.
    """
    if len(before) != len(after):
        raise ValueError(f"a paired test needs the same episodes: {len(before)} before, {len(after)} after")
    improved = sum(a and not b for b, a in zip(before, after, strict=True))
    worsened = sum(b and not a for b, a in zip(before, after, strict=True))
    n = improved + worsened
    tail = sum(math.comb(n, i) for i in range(min(improved, worsened) + 1)) / 2**n
    return PairedTest(improved=improved, worsened=worsened, p_value=min(1.0, 2 * tail))


def explained_variance(predictions: Float32[np.ndarray, "B"], targets: Float32[np.ndarray, "B"]) -> float:
    """1 - Var(targets - predictions) / Var(targets); 0 when the targets do not vary."""
    variance = float(np.var(targets))
    if variance < 1e-12:
        return 0.0
    return 1.0 - float(np.var(targets - predictions)) / variance
