"""Evaluation beside training on one machine: a child process of low priority plays with a copy of the weights."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reachrl.backends.base import Pending, SharedWeights, Weights
from reachrl.child import Child
from reachrl.config.train import TrainConfig
from reachrl.errors import ExtensionError, WorkerError
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Start

_LIVES = 3  # processes that may be lost over one point


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the process is to play; its answer is the episodes with the time it took, or an error."""

    policy: Path  # a saved policy's folder
    starts: tuple[Start, ...]
    mode: str


class BackgroundEvaluator:
    """Plays validation starts in a process of its own, which yields the cores to training.

    Args:
        config: the run's; `backend.evaluator_envs` environments.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._child: Child | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="reachrl-validation-"))
        self._log = SpanLog("evaluator")

    def play(self, weights: Weights, starts: Sequence[Start], mode: str) -> Pending[list[PlayedEpisode]]:
        """Begin to play every start once with a copy of these weights."""
        assert isinstance(weights, SharedWeights), "weights of one process are not sent"
        folder = self._folder / "policy"
        shutil.rmtree(folder, ignore_errors=True)
        weights.policy.save_pretrained(folder)
        task = Task(policy=folder, starts=tuple(starts), mode=mode)
        self._send(task)
        return Pending(lambda: self._episodes(task))

    def take_spans(self) -> list[Span]:
        """When was played."""
        return self._log.take()

    def close(self) -> None:
        """End the process."""
        self._end_child()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _running(self) -> Child:
        """The process, started if there is none."""
        if self._child is None:
            self._child = Child("reachrl.backends.background_process", {})
            self._child.pipe.send(self._config)
        return self._child

    def _end_child(self) -> None:
        """End the process; the next task starts another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _send(self, task: Task) -> None:
        try:
            self._running().pipe.send(task)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process is gone, which shows when its answer is read

    def _episodes(self, task: Task) -> list[PlayedEpisode]:
        """Wait for a task's episodes; a lost process is replaced and plays it again, with the same outcomes.

        Raises:
            ExtensionError: the environment has no validation starts of its own.
            WorkerError: the process keeps dying, or could not play.
        """
        for life in range(1, _LIVES + 1):
            child = self._running()
            try:
                answer = child.pipe.recv()
                break
            except (EOFError, ConnectionResetError):
                how, words = child.epitaph()
                self._end_child()
                if life == _LIVES:
                    raise WorkerError(
                        f"the process that evaluates beside training {how}, {_LIVES} times in a row (its last words: "
                        f"{words or 'none'}); set backend.evaluator_envs=0 to evaluate while training waits"
                    ) from None
                self._send(task)
        if isinstance(answer, Exception):
            if isinstance(answer, ExtensionError):
                raise answer
            raise WorkerError(f"evaluation beside training failed: {answer}") from answer
        episodes, spans = answer
        self._log.extend(spans)
        return episodes
