"""Runs a reward model in several processes."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from reachrl.backends.cluster.calls import Call, Lost, Remote
from reachrl.errors import WorkerError
from reachrl.rewards.process.base import RewardModel
from reachrl.run.spans import Span

log = logging.getLogger(__name__)

_MAX_LOSSES = 3  # of the same worker for one batch


class ClusterScoring:
    """Deals clips out to reward workers; a lost one is replaced and its clips are scored again.

    Args:
        processes: the workers.
        spawn: starts another worker number i.
    """

    def __init__(self, processes: Sequence[Remote], spawn: Callable[[int], Remote]) -> None:
        self._workers, self._spawn, self.parallel = list(processes), spawn, len(processes)
        self._model: RewardModel | None = None
        self._stored: Any = None  # the model in the object store
        self._spans: list[Span] = []

    def __call__(
        self, model: RewardModel, clips: np.ndarray, instructions: Sequence[str], *, batch_size: int
    ) -> np.ndarray:
        """P(progress) f32[B] of clips u8[B F H W 3].

        Raises:
            WorkerError: a worker is lost again and again.
        """
        if model is not self._model:
            self._model, self._stored = model, ray.put(copy.deepcopy(model).cpu())
            for worker in self._workers:
                worker.begin("take_model", self._stored)
        parts = [rows for rows in np.array_split(np.arange(len(clips)), self.parallel) if len(rows)]
        jobs = [(clips[rows], [instructions[row] for row in rows], batch_size) for rows in parts]
        calls = [self._workers[number].begin("score", *job) for number, job in enumerate(jobs)]
        return np.concatenate([self._answer(number, call, jobs[number]) for number, call in enumerate(calls)])

    def take_spans(self) -> list[Span]:
        """When each worker scored."""
        taken, self._spans = self._spans, []
        return taken

    def _noted(self, number: int, answer: tuple[np.ndarray, tuple[float, float]]) -> np.ndarray:
        scores, (began, ended) = answer
        self._spans.append(Span(f"reward worker {number}", "score frames", began, ended))
        return scores

    def _answer(self, number: int, call: Call, job: tuple) -> np.ndarray:
        for _ in range(_MAX_LOSSES):
            try:
                return self._noted(number, call.result())
            except Lost as lost:
                log.warning("%s; another process takes its place", lost)
                self._workers[number].kill()
                self._workers[number] = self._spawn(number)
                self._workers[number].begin("take_model", self._stored)
                call = self._workers[number].begin("score", *job)
        try:
            return self._noted(number, call.result())
        except Lost as lost:
            raise WorkerError(f"reward worker {number} was lost {_MAX_LOSSES + 1} times in a row: {lost}") from lost
