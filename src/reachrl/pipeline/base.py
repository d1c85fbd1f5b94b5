"""Interfaces shared by the stages: progress display, and caveats of success rates."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from reachrl.config.train import TrainConfig
from reachrl.registry import resolve


class StageProgress(Protocol):
    """One progress bar."""

    def advance(self, n: int = 1, **fields: Any) -> None:
        """`n` more units are done; `fields` are the newest figures."""
        ...


class Display(Protocol):
    """Where progress goes: a terminal, a log, or nothing."""

    def stage(
        self, name: str, total: int | None = None, description: str = "", *, completed: int = 0
    ) -> AbstractContextManager[StageProgress]:
        """Show a bar while the block runs."""
        ...

    def log(self, text: str) -> None:
        """Print a line."""
        ...


def caveats(config: TrainConfig) -> tuple[str, ...]:
    """Caveats that belong to success rates measured with `config`."""
    return resolve("envs", config.env.kind).caveats(config.env)
