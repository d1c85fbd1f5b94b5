"""Who did what when: the raw material of the timeline."""

import contextlib
import time
from collections.abc import Iterator
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

    def take(self) -> list[Span]:
        """What was noted since the last time."""
        taken, self._spans = self._spans, []
        return taken
