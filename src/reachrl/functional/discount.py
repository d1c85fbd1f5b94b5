"""The discount of decisions that last several control steps."""

import numpy as np
from jaxtyping import Float64, Int32


def discounts(gamma: float, steps: Int32[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """`gamma ** steps`: what a reward is worth that comes so many control steps later.

    Args:
        gamma: discount of one control step.
        steps: numbers from 0.

    Source: semi-Markov decision processes: Sutton, Precup and Singh 1999, eq. 2 of section 1 (options).
    """
    # Python's power: gamma ** 1 is gamma to the last bit, which vectorised powers need not give.
    powers = np.array([gamma**count for count in range(int(steps.max(initial=0)) + 1)], np.float64)
    return powers[steps]
