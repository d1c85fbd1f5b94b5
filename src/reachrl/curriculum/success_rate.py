"""A curriculum that prefers tasks and start states which succeed about half of the time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reachrl.config.curriculum import SuccessRateConfig
from reachrl.curriculum.base import TaskSampler
from reachrl.types import Episode


class SuccessRateSampler(TaskSampler):
    """Weights each (task, start) by its smoothed success rate.

    A task's rate is smoothed towards 50 %, a start's towards its task's, both with `prior_strength`
    pseudo-outcomes, so that a start never tried inherits what is known of its task. Evidence fades with every outcome
    of the task. If a start's faded with its own outcomes only, a start that once failed would keep its weight until
    it is drawn again, and starts that are equally hard would not be drawn equally often.

    Source: VLA-RL (arXiv 2505.18719), eq. 4 for `paper`. `peak` implements the paper's text ("around 50 %"):
    4 s (1 - s) is the variance of the outcome, which bounds what a policy gradient can learn from it.
    """

    Config = SuccessRateConfig
    config: SuccessRateConfig

    def __init__(self, config: SuccessRateConfig, *, tasks: Sequence[str], num_starts: int, seed: int) -> None:
        super().__init__(config, tasks=tasks, num_starts=num_starts, seed=seed)
        shape = (len(self.tasks), num_starts)
        self._wins, self._tries = np.zeros(shape), np.zeros(shape)  # decayed counts by start
        self._task_wins, self._task_tries = np.zeros(shape[0]), np.zeros(shape[0])

    def success_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Smoothed estimates: f64[tasks] and f64[tasks, starts]."""
        prior = self.config.prior_strength
        by_task = (self._task_wins + 0.5 * prior) / (self._task_tries + prior)
        by_start = (self._wins + by_task[:, None] * prior) / (self._tries + prior)
        return by_task, by_start

    def probabilities(self) -> np.ndarray:
        """Chance f64[tasks, starts]: the floor's uniform share plus the weighted share."""
        _, success = self.success_rates()
        if self.config.weighting == "peak":
            logits = np.log(4 * success * (1 - success)) / self.config.temperature
        else:
            logits = (0.5 - success) / self.config.temperature
        weights = np.exp(logits - logits.max())  # a small temperature must not overflow
        return self.config.floor / weights.size + (1 - self.config.floor) * weights / weights.sum()

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Add outcomes; older ones, of all starts of the task, fade over `window` outcomes of the task."""
        keep = 1 - 1 / self.config.window
        for episode in episodes:
            task, start = self.tasks.index(episode.start.task), episode.start.index
            self._task_wins[task] = keep * self._task_wins[task] + episode.success
            self._task_tries[task] = keep * self._task_tries[task] + 1
            self._wins[task] *= keep
            self._tries[task] *= keep
            self._wins[task, start] += episode.success
            self._tries[task, start] += 1

    def metrics(self) -> dict[str, float]:
        """Chance and estimated success of each task."""
        chances, (success, _) = self.probabilities().sum(1), self.success_rates()
        return {f"curriculum/{task}": float(p) for task, p in zip(self.tasks, chances, strict=True)} | {
            f"curriculum_success/{task}": float(s) for task, s in zip(self.tasks, success, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts by task and start."""
        return {
            "wins": self._wins.tolist(),
            "tries": self._tries.tolist(),
            "task_wins": self._task_wins.tolist(),
            "task_tries": self._task_tries.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s output."""
        self._wins, self._tries = np.array(state["wins"]), np.array(state["tries"])
        self._task_wins, self._task_tries = np.array(state["task_wins"]), np.array(state["task_tries"])
