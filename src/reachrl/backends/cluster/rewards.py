"""Runs a reward model in several processes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from reachrl.backends.cluster.calls import Call, Remote, insist
from reachrl.rewards.process.base import RewardModel
from reachrl.run.spans import Span, SpanLog


class ClusterScoring:
    """Distributes clips over reward workers; a lost worker is replaced and its clips are scored again.

    Args:
        processes: the workers.
        spawn: starts a new process for worker number i.
        max_losses: how often in a row a worker is replaced.
    """

    def __init__(self, processes: Sequence[Remote], spawn: Callable[[int], Remote], *, max_losses: int) -> None:
        self._max_losses = max_losses
        self._workers, self._spawn, self.parallel = list(processes), spawn, len(processes)
        self._model: RewardModel | None = None
        self._stored: Any = None  # the model in the object store
        self._log = SpanLog("reward workers")

    def __call__(
        self, model: RewardModel, clips: np.ndarray, instructions: Sequence[str], *, batch_size: int
    ) -> np.ndarray:
        """P(progress) f32[B] of clips u8[B F H W 3].

        Raises:
            WorkerError: a worker is lost again and again.
        """
        if model is not self._model:
            self._model, self._stored = model, ray.put(model)
            sent = [worker.begin("take_model", self._stored) for worker in self._workers]
            for number, call in enumerate(sent):
                self._insist(number, call, self._stored)
        parts = [rows for rows in np.array_split(np.arange(len(clips)), self.parallel) if len(rows)]
        jobs = [(clips[rows], [instructions[row] for row in rows], batch_size) for rows in parts]
        calls = [self._workers[number].begin("score", *job) for number, job in enumerate(jobs)]
        return np.concatenate([self._answer(number, call, jobs[number]) for number, call in enumerate(calls)])

    def take_spans(self) -> list[Span]:
        """When each worker scored."""
        return self._log.take()

    def _answer(self, number: int, call: Call, job: tuple) -> np.ndarray:
        scores, (began, ended) = self._insist(number, call, *job)
        self._log.extend([Span(f"reward worker {number}", "score frames", began, ended)])
        return scores

    def _insist(self, number: int, call: Call, *arguments: Any) -> Any:
        def again() -> Call:
            self._workers[number].kill()
            self._workers[number] = self._spawn(number)
            if call.method != "take_model":
                self._workers[number].call("take_model", self._stored)
            return self._workers[number].begin(call.method, *arguments)

        return insist(call, again, max_losses=self._max_losses)
