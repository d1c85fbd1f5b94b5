"""Printing to a terminal; escape sequences in printed names are made harmless, as they may come from foreign files."""

import logging
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import StyleType
from rich.table import Table
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


def plain_table(title: str, *columns: str) -> Table:
    """A table without lines; the first column's cells are never broken. Without any name, no head is shown."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = any(columns)
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap = True
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table without splitting a word or a figure.

    Where the terminal is too narrow for that, each cell gets a line of its own, with its column's name, below the
    first cell of its row.

    Args:
        console: Where.
        table: A table of texts; the widths of its columns are set.
    """
    for column in table.columns:
        column.width = None
    wide = console.options.update(max_width=10_000)
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in column.cells] for column in table.columns]
    heads = [Text(str(column.header) if table.show_header else "") for column in table.columns]
    needs = [
        (
            max(each.maximum if column.no_wrap else each.minimum for each in measured),
            max(each.maximum for each in measured),
        )
        for column, head, texts in zip(table.columns, heads, cells, strict=True)
        for measured in [[Measurement.get(console, wide, text) for text in (head, *texts)]]
    ]
    # What the table needs beside its cells' texts: blanks and borders.
    frame = Measurement.get(console, wide, table).maximum - sum(most for _, most in needs)
    free = console.width - frame - sum(least for least, _ in needs)
    if free < 0:
        _print_stacked(console, table, [str(head) for head in heads], cells)
        return
    # Those that want little first, so that what they leave goes to the others.
    order = sorted(range(len(needs)), key=lambda index: needs[index][1] - needs[index][0])
    for place, index in enumerate(order):
        least, most = needs[index]
        more = min(most - least, free // (len(order) - place))
        table.columns[index].width, free = least + more, free - more
    console.print(table)


def _print_stacked(console: Console, table: Table, heads: list[str], cells: list[list[Any]]) -> None:
    if table.title:
        console.print(Text(str(table.title), "bold"))
    indent = max(map(len, heads[1:]), default=0)
    for row, (first, *others) in zip(table.rows, zip(*cells, strict=True), strict=True):
        print_line(console, first, row.style or "")
        for head, cell in zip(heads[1:], others, strict=True):
            if str(cell):
                name = f"  {head:<{indent}}  " if indent else "  "
                print_line(console, Text.assemble(name, cell), row.style or "")


def print_line(console: Console, text: Text, style: StyleType = "") -> None:
    """Print a line, on a terminal broken between words alone, elsewhere not at all; a long path stays whole."""
    lines = text.split("\n", allow_blank=True)
    if console.is_terminal:
        lines = [part for line in lines for part in line.divide(_breaks(str(line), console.width))]
    for line in lines:
        console.print(line, style=style, soft_wrap=True, highlight=False)


def _breaks(line: str, width: int) -> list[int]:
    """Where a line is to be broken so that each part, if it has several words, fits."""
    breaks, used = [], 0
    for word in re.finditer(r"\s*\S+\s*", line):
        if used and used + cell_len(word[0].rstrip()) > width:
            breaks.append(word.start())
            used = 0
        used += cell_len(word[0])
    return breaks


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
