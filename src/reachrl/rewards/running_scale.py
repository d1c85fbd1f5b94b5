"""A running standard deviation, for scaling rewards."""

from typing import Any

import numpy as np
from jaxtyping import Float


class RunningScale:
    """Mean and variance of everything seen so far, updated batch by batch.

    Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, numbers: Float[np.ndarray, "B"]) -> None:
        """Add numbers to the statistics."""
        count = len(numbers)
        if count == 0:
            return
        mean = float(numbers.mean(dtype=np.float64))
        squares = float(((numbers - mean) ** 2).sum(dtype=np.float64))
        gap, total = mean - self.mean, self.count + count
        self.mean += gap * count / total
        self.squares += squares + gap**2 * self.count * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 until there are two different numbers."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
