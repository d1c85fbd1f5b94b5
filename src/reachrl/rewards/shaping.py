"""Potential-based shaping: a dense reward that leaves the best policy as it is."""

import numpy as np
from jaxtyping import Bool, Float32

from reachrl.types import Rollout


def terminal_steps(rollout: Rollout, *, bootstrap_truncated: bool) -> Bool[np.ndarray, "T N"]:
    """The valid steps after which the learner expects no more reward; a time limit only where it says so."""
    ended = rollout.terminated if bootstrap_truncated else rollout.terminated | rollout.truncated
    return ended & rollout.valid


def potential_difference(
    before: Float32[np.ndarray, "T N"],
    after: Float32[np.ndarray, "T N"],
    terminal: Bool[np.ndarray, "T N"],
    *,
    gamma: float,
) -> Float32[np.ndarray, "T N"]:
    """`gamma * after - before`, the potential of a terminal state being 0.

    Args:
        before: potential of the state each step began in.
        after: potential of the state it led to; ignored where `terminal`.
        terminal: steps that end the episode for the learner.
        gamma: the learner's discount; another one changes the best policy.

    Source: Ng, Harada and Russell 1999, Policy invariance under reward transformations, theorem 1.
    """
    return np.float32(gamma) * np.where(terminal, np.float32(0), after) - before
