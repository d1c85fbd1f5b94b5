"""`reachrl model`: describe a checkpoint folder, and compare its outputs with the official code's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reachrl.cli.terminal import Terminal, plain_table, print_table
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.policies.folders import Inspection

app = typer.Typer(help="Look into checkpoint folders: info, verify.", no_args_is_help=True)
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint's folder.")]
_BYTES = {"bfloat16": 2, "float32": 4}


@app.callback()
def model() -> None:
    """Checkpoint folders."""


@app.command()
def info(folder: FolderArgument) -> None:
    """Show sizes, weights, statistics, prompt and memory of a checkpoint. Reads headers only, never the weights."""
    from reachrl.policies.folders import folders_of

    console, place = Terminal(), folder
    while place is not None:
        if place is not folder:
            console.print("\nThe base:")
        where, folders = folders_of(place)
        found = folders.inspect(where)
        for table in _tables(found):
            print_table(console, table)
        place = found.base


@app.command()
def verify(
    folder: FolderArgument,
    recorded: Annotated[
        Path, typer.Option("--recorded", metavar="FILE", help="Safetensors with in- and outputs of the official code.")
    ],
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="The statistics of the recorded actions.")
    ] = None,
    tower_heads: Annotated[
        str | None, typer.Option("--tower-heads", metavar="N,N", help="Attention heads of towers never released.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Of the policy, where no file states it: chunk_size=8."),
    ] = None,
) -> None:
    """Compute recorded outputs of the official code again; exit code 1 if one does not agree or was not recorded."""
    heads = None if tower_heads is None else _heads(tower_heads)
    from reachrl.policies.folders import folders_of

    where, folders = folders_of(folder)
    given = {"options": dict(_pair(each) for each in option)} if option else {}
    result = folders.verify(where, recorded, dataset=dataset, tower_heads=heads, **given)
    table = plain_table("Recorded and computed again", "tensor", "largest difference", "tolerance", "")
    for check in result.checks:
        table.add_row(
            check.name,
            f"{check.difference:.0f} differ" if check.exact else f"{check.difference:.1e}",
            "exact" if check.exact else f"{check.tolerance:.0e}",
            Text("pass", "green") if check.passed else Text("FAIL", "bold red"),
        )
    console = Terminal()
    print_table(console, table)
    if result.missing:
        text = f"FAIL: the function is not verified without {', '.join(result.missing)}; record them too"
        console.print(Text(text, "bold red"))
    if result.ignored:
        console.print(f"Not compared: {', '.join(result.ignored)}", highlight=False)
    if not result.passed:
        raise typer.Exit(1)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option {text!r}: expected KEY=VALUE, such as chunk_size=8")
    return key.removeprefix("policy."), value


def _heads(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--tower-heads {text!r}: expected one number for each tower, such as 16,16")
    return [int(number) for number in numbers]


def _tables(found: "Inspection") -> list[Table]:
    facts = plain_table(f"{found.folder}", "", "")
    for name, fact in found.facts.items():
        facts.add_row(name, fact)
    return [facts, *([_parts(found)] if found.parts else []), *([_memory(found)] if found.numbers else [])]


def _parts(found: "Inspection") -> Table:
    table = plain_table("\nWeights", "part", "sizes", "stored", "never read")
    for part in found.parts:
        table.add_row(part.name, part.sizes, f"{part.num_weights:,}", f"{part.num_unread:,}")
    stored, unread = sum(part.num_weights for part in found.parts), sum(part.num_unread for part in found.parts)
    table.add_row("all", f"{stored - unread:,} are read", f"{stored:,}", f"{unread:,}")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    table.columns[1].ratio = 1
    return table


def _memory(found: "Inspection") -> Table:
    table = plain_table("\nMemory in GB", "", *_BYTES)
    for name, numbers in found.numbers.items():
        table.add_row(name, *(f"{numbers * size / 1e9:.3f}" for size in _BYTES.values()))
    return table
