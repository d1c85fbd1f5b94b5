"""Timing spans of the workers, from which the timeline is drawn."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One timed piece of work, in seconds since the epoch, so that spans of several processes can be compared."""

    who: str
    what: str
    start: float
    end: float


class SpanLog:
    """Records the spans of one worker until `take`.

    Args:
        who: the worker's name, such as "actor 0".
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._spans: list[Span] = []

    def add(self, what: str, start: float, end: float | None = None) -> None:
        """Record a span from `start` to `end`, or to now."""
        self._spans.append(Span(self.who, what, start, time.time() if end is None else end))

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Record the block as a span."""
        start = time.time()
        try:
            yield
        finally:
            self.add(what, start)

    def extend(self, spans: Iterable[Span]) -> None:
        """Add spans that were recorded by others."""
        self._spans.extend(spans)

    def take(self) -> list[Span]:
        """Return and clear the recorded spans."""
        taken, self._spans = self._spans, []
        return taken


class Timelines:
    """Spans of the last two iterations: what actors collect ahead in one is known only after the next."""

    def __init__(self) -> None:
        self._loops: list[tuple[int, list[Span]]] = []
        self._others: list[list[Span]] = []

    def note(self, iteration: int, loop: list[Span], others: list[Span]) -> None:
        """Add an iteration: the loop's spans, which define its extent, and the spans of the workers."""
        self._loops = [*self._loops[-1:], (iteration, loop)]
        self._others = [*self._others[-1:], others]

    def typical(self, *, ahead: bool) -> tuple[int, list[Span]]:
        """Number and spans of the last iteration; where rollouts are collected ahead, of the one before it.

        Before a checkpoint nothing is collected ahead, so that the last one then shows too little.
        """
        iteration, loop = self._loops[0 if ahead else -1]
        began, ended = min(span.start for span in loop), max(span.end for span in loop)
        others = [span for told in self._others for span in told if span.start < ended and span.end > began]
        return iteration, [*loop, *others]
