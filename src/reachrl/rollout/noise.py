"""Sampling noise addressed by (seed, episode, step), so that there is no generator state to save."""

import numpy as np


def episode_gumbel(key: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Standard Gumbel noise f32 of `shape`; the same key always gives the same numbers.

    Args:
        key: non-negative integers, for example (seed, episode number, step).
        shape: usually (A, 256).

    Source: argmax(logits + Gumbel noise) samples the softmax (Gumbel 1954; Maddison et al. 2014).
    """
    return np.random.default_rng(key).gumbel(size=shape).astype(np.float32)
