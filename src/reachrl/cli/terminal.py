"""Printing to a terminal; escape sequences in printed names are made harmless, as they may come from foreign files."""

import logging
import unicodedata
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Control characters (with them escape sequences), invisible ones that change the direction of text, halves of pairs
# that stand for bytes which are no UTF-8, separators of lines and paragraphs.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_KEPT = {"\n", "\t"}


def printable(text: str) -> str:
    r"""`text` with control characters written as escapes, such as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE and char not in _KEPT
        else char
        for char in text
    )


class Terminal(Console):
    """A console that prints text literally: no markup is interpreted, and escape sequences are escaped."""

    def __init__(self, **options: Any) -> None:
        """See `rich.console.Console`."""
        super().__init__(markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before widths are measured."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape whatever is drawn; styles are not part of the text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def say(text: str, *, err: bool = False) -> None:
    """Print a line literally."""
    typer.echo(printable(text), err=err)


class _Messages(logging.Handler):
    """Prints warnings of commands that show no progress."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


def print_warnings() -> None:
    """Print log records of commands without a progress display through `Terminal`."""
    logging.lastResort = _Messages(logging.WARNING)  # pyright: ignore[reportAttributeAccessIssue]
