"""Who did what when: the raw material of the timeline."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work; seconds since the epoch, so that spans of several processes can be laid side by side."""

    who: str
    what: str
    start: float
    end: float


class SpanLog:
    """Collects the spans of one worker until they are taken.

    Args:
        who: the worker's name, such as "actor 0".
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._spans: list[Span] = []

    def add(self, what: str, start: float, end: float | None = None) -> None:
        """Note a piece of work that began at `start` and ended at `end`, or now."""
        self._spans.append(Span(self.who, what, start, time.time() if end is None else end))

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Note the block as a piece of work."""
        start = time.time()
        try:
            yield
        finally:
            self.add(what, start)

    def extend(self, spans: Iterable[Span]) -> None:
        """Note what others have told of their work."""
        self._spans.extend(spans)

    def take(self) -> list[Span]:
        """What was noted since the last time."""
        taken, self._spans = self._spans, []
        return taken


class Timelines:
    """The last two iterations: what actors did ahead in one is known only after the next."""

    def __init__(self) -> None:
        self._loops: list[tuple[int, list[Span]]] = []
        self._others: list[list[Span]] = []

    def note(self, iteration: int, loop: list[Span], others: list[Span]) -> None:
        """Add an iteration: the loop's spans, which say when it was, and what the others have told in it."""
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
