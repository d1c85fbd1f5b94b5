"""Plays held-out episodes in a separate process while training goes on."""

from collections.abc import Callable, Sequence
from typing import Any

from reachrl.backends.base import Pending, Weights
from reachrl.backends.cluster.calls import Call, Remote, insist
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Start


class ClusterEvaluator:
    """One process with a copy of the policy and environments; a lost one is replaced and plays again.

    Args:
        process: the evaluator.
        spawn: starts a new process.
        max_losses: how often in a row it is replaced.
    """

    def __init__(self, process: Remote, spawn: Callable[[], Remote], *, max_losses: int) -> None:
        self._process, self._spawn, self._max_losses = process, spawn, max_losses
        self._log = SpanLog("evaluator")

    def play(self, weights: Weights, starts: Sequence[Start], mode: str) -> Pending[list[PlayedEpisode]]:
        """Begin to play every start once with these weights."""
        arguments = (weights, tuple(starts), mode)
        call = self._process.begin("play", *arguments)
        return Pending(lambda: self._answer(call, arguments))

    def take_spans(self) -> list[Span]:
        """The evaluator's spans."""
        return self._log.take()

    def _answer(self, call: Call, arguments: tuple[Any, ...]) -> list[PlayedEpisode]:
        def again() -> Call:
            self._process.kill()
            self._process = self._spawn()
            return self._process.begin("play", *arguments)

        episodes, span = insist(call, again, max_losses=self._max_losses)
        self._log.extend([span])
        return episodes
