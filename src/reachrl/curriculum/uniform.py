"""The baseline curriculum: every task and start state equally often."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reachrl.config.curriculum import UniformConfig
from reachrl.curriculum.base import TaskSampler
from reachrl.types import Episode


class UniformSampler(TaskSampler):
    """Draws uniformly over (task, start)."""

    Config = UniformConfig

    def probabilities(self) -> np.ndarray:
        """Equal chances f64[tasks, starts]."""
        return np.full((len(self.tasks), self.num_starts), 1 / (len(self.tasks) * self.num_starts))

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Outcomes change nothing."""

    def metrics(self) -> dict[str, float]:
        """Equal chances by task."""
        return {f"curriculum/{task}": 1 / len(self.tasks) for task in self.tasks}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""
