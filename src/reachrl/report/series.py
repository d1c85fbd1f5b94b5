"""The numbers that the report's charts show, from metrics records."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from reachrl.functional.stats import wilson

_MOST_POINTS = 600  # of a line or a cloud of dots: a screen shows no more
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """What a chart over training is drawn against."""

    css: str  # of the pictures that are drawn against it
    label: str
    numbers: tuple[tuple[float, float], ...]  # (iteration, place), ascending; none: the iteration itself

    def at(self, iteration: float) -> float:
        """The place of an iteration: that of the last record up to it, 0 before the first."""
        if not self.numbers:
            return iteration
        index = bisect_right(self.numbers, (iteration, math.inf))
        return self.numbers[index - 1][1] if index and iteration > 0 else 0.0


def time_axes(train: Sequence[dict[str, Any]]) -> list[TimeAxis]:
    """Iterations, environment steps, and hours of training, those that the records know."""
    axes = [TimeAxis("x-iterations", "training iteration", ())]
    steps = [(r["iteration"], float(r["env_steps"])) for r in train if r.get("env_steps") is not None]
    if train and len(steps) == len(train):
        axes.append(TimeAxis("x-steps", "environment steps", tuple(steps)))
    hours, passed = [], 0.0
    for record in train:
        passed += sum(value or 0.0 for key, value in record.items() if key.startswith("seconds/")) / 3600
        hours.append((record["iteration"], passed))
    if passed > 0:
        axes.append(TimeAxis("x-hours", "hours of training", tuple(hours)))
    return axes


def rate_of(record: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Return the rate and interval of a `{k, n, ...}` record, computing what it does not carry."""
    k, n = record["k"], record["n"]
    rate = record.get("rate")
    low, high = record.get("wilson95") or wilson(k, n)
    return (k / n if n else 0.0) if rate is None else rate, (low, high)


def moving_success(train: Sequence[dict[str, Any]], window: int) -> list[tuple[float, float, float, float]]:
    """Pool the episodes of the last `window` iterations.

    Args:
        train: Metrics records with `iteration`, `success_k` and `success_n`.
        window: How many iterations are pooled.

    Returns:
        (iteration, rate, low, high) wherever an episode ended in the window; the interval is Wilson's.
    """
    successes, episodes = ([0, *accumulate(r.get(key) or 0 for r in train)] for key in ("success_k", "success_n"))
    pooled = []
    for end, record in enumerate(train, start=1):
        begin = max(0, end - window)
        if n := episodes[end] - episodes[begin]:
            k = successes[end] - successes[begin]
            pooled.append((record["iteration"], k / n, *wilson(k, n)))
    return pooled


def moving_uniform_success(train: Sequence[dict[str, Any]], window: int) -> list[tuple[float, float, float, float]]:
    """Pool `success_uniform` of the last `window` iterations by the weights of their episodes.

    Args:
        train: Metrics records with `iteration`, `success_uniform`, `success_uniform_weight` and `success_uniform_n`.
        window: How many iterations are pooled.

    Returns:
        (iteration, rate, low, high) wherever the window has a figure; the interval is Wilson's at the effective number
        of episodes.
    """
    pooled = []
    for i, record in enumerate(train):
        recent = [r for r in train[max(0, i - window + 1) : i + 1] if r.get("success_uniform") is not None]
        weight = sum(r["success_uniform_weight"] for r in recent)
        if weight:
            rate = sum(r["success_uniform"] * r["success_uniform_weight"] for r in recent) / weight
            n = weight**2 / sum(r["success_uniform_weight"] ** 2 / r["success_uniform_n"] for r in recent)
            pooled.append((record["iteration"], rate, *wilson(min(rate, 1.0) * n, n)))
    return pooled


def block_means(numbers: dict[float, float | None], most: int = 150) -> list[tuple[float, float | None]]:
    """Order {step: number} and average neighbours until at most `most` points are left.

    Args:
        numbers: A number for each step; None (undefined) is left out.
        most: Most points wanted.
    """
    known = sorted((step, number) for step, number in numbers.items() if number is not None)
    return [mean_row(block) for block in blocks(known, most)]  # type: ignore[misc]


def thinned(points: Sequence[tuple[float, float | None]]) -> Sequence[tuple[float, float | None]]:
    """Average neighbours of a line with more points than a screen shows; None where a block has no number."""
    if len(points) <= _MOST_POINTS:
        return points
    means = []
    for block in blocks(points):
        known = [(x, y) for x, y in block if y is not None]
        means.append(mean_row(known) if known else block[0])
    return means


def blocks(rows: Sequence[_Row], most: int = _MOST_POINTS) -> list[Sequence[_Row]]:
    """Split rows into at most `most` blocks of neighbours, equally long but for the last."""
    size = max(1, math.ceil(len(rows) / most))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def mean_row(block: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The mean of each column."""
    return tuple(sum(column) / len(block) for column in zip(*block, strict=True))
