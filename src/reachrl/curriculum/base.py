"""The interface of a curriculum over tasks and start states."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from reachrl.config.base import Section
from reachrl.streams import Stream, generator
from reachrl.types import Draw, Episode, Start


class TaskSampler(ABC):
    """Chooses the training start state of each new episode.

    Args:
        config: the sampler's section.
        tasks: the task names.
        num_starts: training starts per task.
        seed: of the draws. Draw number i depends on (seed, i) and on what has been observed.
    """

    Config: ClassVar[type[Section]]

    def __init__(self, config: Any, *, tasks: Sequence[str], num_starts: int, seed: int) -> None:
        self.config = config
        self.tasks = tuple(tasks)
        self.num_starts = num_starts
        self.seed = seed

    def assign(self, number: int) -> Start:
        """Task and start state of episode `number`: a pure function, so that calls may come in any order."""
        probabilities = self.probabilities()
        # A stream per draw: there is no random state to checkpoint.
        draw = generator(self.seed, Stream.CURRICULUM, number)
        unit = int(draw.choice(probabilities.size, p=probabilities.ravel()))
        task, index = divmod(unit, self.num_starts)
        return Start(self.tasks[task], "train", index)

    def draw(self, number: int) -> Draw:
        """`assign(number)` with the probability of that start, by which success is weighed to the uniform mean.

        A sampler with an `assign` of its own need not draw from `probabilities`: the probability is then unknown.
        """
        start = self.assign(number)
        if type(self).assign is not TaskSampler.assign:
            return Draw(start)
        return Draw(start, float(self.probabilities()[self.tasks.index(start.task), start.index]))

    @abstractmethod
    def probabilities(self) -> np.ndarray:
        """Chance f64[tasks, starts] of each unit in the next draw; sums to 1."""

    @abstractmethod
    def observe(self, episodes: Sequence[Episode]) -> None:
        """Learn from finished episodes."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """`curriculum/<task>`: chance of each task; `curriculum_success/<task>`: estimated success."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs, as JSON-ready values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s output."""
