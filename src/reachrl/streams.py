"""Random numbers addressed by what they are for, so that there is no generator state to save.

A draw comes from `(seed, stream, key)` alone: a resumed run needs no history, and an episode does not depend on
which worker ran it. Two things are drawn elsewhere: initial weights, by torch's generator and the run's seed, and
Meta-World's start states, which no seed changes, by a generator for each task, split and number.
"""

import zlib
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are used for. The number is part of every published figure: never change one."""

    CURRICULUM = 1
    ROLLOUT_NOISE = 2
    EVALUATION_NOISE = 3
    MINIBATCHES = 4
    EXPERT_NOISE = 5
    DEMO_SPLIT = 6
    SFT_ORDER = 7
    SFT_AUGMENTATION = 8
    SFT_HELDOUT = 9
    SFT_DROPOUT = 10
    REWARD_SPLIT = 11
    REWARD_BATCHES = 12
    REWARD_PROBE = 13
    REWARD_SHUFFLE = 14
    LIBERO_STARTS = 15
    WEIGHT_PROBE = 16
    KL_ROWS = 17
    LIBERO_VALIDATION_STARTS = 18
    VALIDATION_NOISE = 19
    PRACTICE_NOISE = 20
    PERTURBATION = 21
    RANDOMISE_TRAINING = 22
    RANDOMISE_DEMOS = 23
    PUBLISHED_SAMPLE = 24


def sequence(seed: int, stream: Stream, *key: int | str) -> np.random.SeedSequence:
    """The entropy of one use.

    Args:
        seed: of the run; not negative.
        stream: what for.
        key: which one of the stream's draws: integers in [0, 2^32) and names, always as many for one stream.
    """
    # numpy pads with zeros, so (seed, 1) and (seed, 1, 0) are one sequence; and a large seed takes several
    # words. Told apart first, and the seed last, no two uses can meet.
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.SeedSequence([int(stream), *words, seed])


def generator(seed: int, stream: Stream, *key: int | str) -> np.random.Generator:
    """A generator of its own for one use; see `sequence`."""
    return np.random.default_rng(sequence(seed, stream, *key))
