"""The number of steps, the learning rate at each and the rows of each minibatch: functions of the step alone."""

import numpy as np
from jaxtyping import Int64

from reachrl.config.demos import SFTSection
from reachrl.fitting import scheduled
from reachrl.streams import Stream, generator


def total_steps(config: SFTSection, rows: int) -> int:
    """Optimiser steps for a training set of `rows` steps."""
    return config.steps or max(1, round(config.epochs * rows / config.batch_size))


def learning_rate(config: SFTSection, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to `final_lr_fraction` at the last of `steps` (step counts from 0)."""
    warmup = min(config.warmup_steps, steps // 10)
    return scheduled(config.lr, step, warmup=warmup, end=steps - 1, final=config.final_lr_fraction)


def batch_rows(rows: Int64[np.ndarray, "R"], step: int, batch_size: int, seed: int) -> Int64[np.ndarray, "B"]:
    """The rows of one minibatch, from an endless stream of shuffled epochs.

    A function of (seed, step) alone: a resumed training needs no loader state. Every row comes once an epoch.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    count = len(rows)
    parts = []
    for epoch in range(first // count, (last - 1) // count + 1):
        order = generator(seed, Stream.SFT_ORDER, epoch).permutation(count)
        parts.append(order[max(0, first - epoch * count) : last - epoch * count])
    return rows[np.concatenate(parts)]
