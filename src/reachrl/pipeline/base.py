"""What the stages share: how progress is shown, and what stands beside success rates."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from reachrl.config.train import TrainConfig
from reachrl.registry import resolve


class StageProgress(Protocol):
    """One bar."""

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
        """Print a line that stays."""
        ...


def caveats(config: TrainConfig) -> tuple[str, ...]:
    """What has to stand beside success rates measured with `config`."""
    return resolve("envs", config.env.kind).caveats(config.env)
