"""`reachrl list`: presets, tasks and kinds that a configuration can name."""

from contextlib import nullcontext
from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from reachrl.cli.terminal import Terminal, plain_table, print_table


class What(StrEnum):
    """What can be listed."""

    presets = "presets"
    tasks = "tasks"
    kinds = "kinds"


def list_(
    what: Annotated[
        What | None, typer.Argument(metavar="WHAT", help="Only presets, tasks or kinds.", show_default="all")
    ] = None,
) -> None:
    """List presets, tasks with their instructions, and the kinds of every extension point; a terminal gets pages."""
    console = Terminal()
    tables = {What.presets: (_presets,), What.tasks: (_tasks, _libero_tasks), What.kinds: (_kinds,)}
    shown = [table() for name, found in tables.items() if what in (None, name) for table in found]
    rows = sum(table.row_count + 3 for table in shown)  # with title, columns and a blank line
    with console.pager(styles=True) if console.is_terminal and rows > console.height else nullcontext():
        for table in shown:
            print_table(console, table)


def _presets() -> Table:
    from reachrl.config.loading import list_presets

    table = plain_table("Presets", "preset", "what it is")
    for name, description in list_presets().items():
        table.add_row(name, description)
    return table


def _tasks() -> Table:
    from reachrl.config.metaworld_tasks import INSTRUCTIONS

    table = plain_table("\nTasks of kind `metaworld` (env.tasks=a,b,c)", "task", "instruction")
    for task, instruction in INSTRUCTIONS.items():
        table.add_row(task, instruction)
    return table


def _libero_tasks() -> Table:
    from reachrl.config.libero_tasks import SUITES, instruction

    table = plain_table(
        "\nTasks of kind `libero` (env.suite=...; env.tasks=a,b,c for some of it)", "suite", "instruction"
    )
    for suite, tasks in SUITES.items():
        for place, task in enumerate(tasks):
            table.add_row("" if place else suite, instruction(task))
    return table


def _kinds() -> Table:
    from reachrl.config.train import KIND_SECTIONS
    from reachrl.registry import kinds

    table = plain_table("\nKinds (a plug-in is named as package.module:Class)", "key", "kind", "class")
    for section, group in KIND_SECTIONS.items():
        for kind, target in kinds(group).items():
            table.add_row(f"{section}.kind", kind, target)
    return table
