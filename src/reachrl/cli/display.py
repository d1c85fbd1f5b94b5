"""Progress display: a live bar on a terminal, plain lines in a log file, and log records in between."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from reachrl.cli.terminal import Terminal, print_line

Field = str | int | float | bool | None
PLAIN_INTERVAL_S = 5.0
_WIDE = 100  # characters from which there is room for a description and a bar
_LABEL, _BAR = 28, 12


class StageProgress:
    """The progress of one running stage, as the work reports it."""

    def __init__(self, display: "Display", name: str, total: int | None, completed: int, task: TaskID | None) -> None:
        self.name = name
        self.total = total
        self.completed = completed
        self._display = display
        self._task = task
        self._started = self._last_line = display.clock()
        self._begun_with = completed
        self._figures: list[str] = []

    def advance(self, n: int = 1, **fields: Field) -> None:
        """Count `n` more units of work and show the newest figures.

        Args:
            n: Units done since the last call; 0 only refreshes the figures.
            fields: Figures by name, in the order they are shown; `None` is left out.
        """
        self.completed += n
        if fields:
            self._figures = format_fields(fields)
        self._display.show(self, self._task)

    def due(self, interval_s: float) -> bool:
        """Whether a plain line was last printed at least `interval_s` ago; counts as printed if so."""
        now = self._display.clock()
        if now - self._last_line < interval_s and self.completed != self.total:
            return False
        self._last_line = now
        return True

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began."""
        return self._display.clock() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds left at the speed so far; None where the total is unknown, or nothing was done yet or is left."""
        done = self.completed - self._begun_with
        if self.total is None or done <= 0 or self.completed >= self.total:
            return None
        return self.elapsed_s / done * (self.total - self.completed)

    def text(self, width: int | None = None) -> str:
        """The newest figures as one string; of those that do not fit into `width` characters the last are left out."""
        figures = list(self._figures)
        while width is not None and figures and len("  ".join(figures)) > width:
            figures.pop()
        return "  ".join(figures)


class Display:
    """Progress and messages of one command.

    On a terminal each stage is a live bar; elsewhere a plain line every few seconds. `quiet` leaves only
    warnings and errors.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Terminal()
        self.quiet = quiet
        self.clock = clock
        self._interval_s = interval_s
        self._live = self.console.is_terminal and not quiet
        self._progress: Progress | None = None

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, description: str = "", *, completed: int = 0
    ) -> Iterator[StageProgress]:
        """Show a stage while its block runs; a stage inside a stage gets a bar of its own for its duration.

        Args:
            name: One word, shown before everything the stage prints.
            total: Units of work, or `None` when unknown.
            description: What is being done, one short phrase.
            completed: Units that an earlier, interrupted attempt already did.
        """
        label = f"{name}: {description}" if description else name
        outermost = self._live and self._progress is None
        if outermost:
            self._progress = _progress_bars(self.console)
            self._progress.start()
        task = None
        if self._progress is not None:
            short = label if self.console.width >= _WIDE else name
            task = self._progress.add_task(short, total=total, completed=completed, figures="")
        elif not self.quiet:
            self._print(f"{label} ({completed}/{total} done)" if completed else label)
        stage = StageProgress(self, name, total, completed, task)
        try:
            yield stage
            if task is None and not self.quiet:
                self._print(f"{name}: finished in {format_duration(stage.elapsed_s)}")
        finally:
            if self._progress is not None and outermost:
                self._progress.stop()
                self._progress = None
            elif self._progress is not None and task is not None:
                self._progress.remove_task(task)

    def show(self, stage: StageProgress, task: TaskID | None) -> None:
        """Refresh a stage's bar, or print its plain line if one is due."""
        if self._progress is not None and task is not None:
            width = figures_width(self.console.width, stage.name, stage.total)
            self._progress.update(task, completed=stage.completed, figures=stage.text(width))
        elif not self.quiet and stage.due(self._interval_s):
            count = f"{stage.completed}/{stage.total}" if stage.total is not None else str(stage.completed)
            left = "" if stage.left_s is None else f", {format_duration(stage.left_s)} left"
            self._print(
                "  ".join(
                    filter(None, [f"{stage.name} {count}", stage.text(), format_duration(stage.elapsed_s) + left])
                )
            )

    def log(self, text: str) -> None:
        """Print a line that stays, above any bar; nothing when quiet."""
        if not self.quiet:
            self._print(text)

    def _print(self, text: str, style: str = "") -> None:
        print_line(self.console, Text(text, style=style))

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Send the package's log records through this display while the block runs."""
        logger, handler = logging.getLogger("reachrl"), _DisplayHandler(self)
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if self.quiet else logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before


class _DisplayHandler(logging.Handler):
    """Prints log records above the bar instead of through it."""

    STYLES: dict[int, str] = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a warning is worth seeing even when quiet."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._display._print(level + self.format(record), self.STYLES.get(record.levelno, ""))


def figures_width(width: int, name: str, total: int | None) -> int:
    """Characters that are left for figures beside the other columns of `_progress_bars`, which come first."""
    what, bar = (_LABEL, _BAR) if width >= _WIDE else (len(name), 0)
    count = 2 * len(str(total or 0)) + 1
    return width - what - bar - count - len("0:00:00") - len("0:00:00") - 6  # a blank between columns, one to spare


def _progress_bars(console: Console) -> Progress:
    """What, bar, count, figures, time gone, time left; on narrow terminals the stage's name alone, and no bar."""
    wide = console.width >= _WIDE
    return Progress(
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=_LABEL)
        ),
        *([BarColumn(bar_width=_BAR)] if wide else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[figures]}",
            style="cyan",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        # An iteration takes seconds: an estimate needs to remember minutes.
        speed_estimate_period=600,
    )


def format_fields(fields: dict[str, Field]) -> list[str]:
    """Write each figure as `name value`, floats with three significant digits."""
    shown = []
    for name, value in fields.items():
        if value is None:
            continue
        shown.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return shown


def format_duration(seconds: float) -> str:
    """Write seconds as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
