"""`reachrl config`: the resolved configuration of a preset, its help, and where it departs from the paper."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from reachrl.cli.stages import OverridesArgument, PresetArgument
from reachrl.cli.terminal import Terminal, print_table, say
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.config.base import Section


def config(
    preset: PresetArgument,
    overrides: OverridesArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, as a run folder keeps it.")] = False,
    with_help: Annotated[bool, typer.Option("--docs", help="Print each key's help above it.")] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Print what differs from the preset paper (of paper: what the preset robust repairs).",
        ),
    ] = False,
) -> None:
    """Print the resolved configuration as TOML; a copy of it is a preset of your own."""
    from reachrl.config.loading import config_dict, load_config, reset_by_kind

    resolved = load_config(preset, overrides or [])
    for note in reset_by_kind(preset, overrides or [], resolved):
        say(f"note: {note}", err=True)
    console = Terminal()
    if explain:
        print_table(console, _deviations(preset, overrides or []))
        return
    if as_json:
        text, language = json.dumps(config_dict(resolved), indent=2, ensure_ascii=False), "json"
    else:
        text, language = "\n".join(toml_lines(resolved, with_help=with_help)), "toml"
    if console.is_terminal:
        console.print(Syntax(text, language, background_color="default", word_wrap=True))
    else:
        say(text)


def _deviations(preset: str, overrides: list[str]) -> Table:
    from reachrl.config.loading import explain

    if overrides:
        raise ConfigError(
            f"--explain gives the reasons of the preset {preset!r}, and overrides ({' '.join(overrides)}) have none; "
            "leave them out."
        )
    compared = "robust" if preset == "paper" else preset
    table = Table(
        title=f"Where {compared} departs from paper", title_justify="left", title_style="bold", pad_edge=False
    )
    for column in ("key", "paper", compared, "why"):
        table.add_column(column, overflow="fold")
    for deviation in explain(compared):
        values = (toml_value(deviation.paper_value), toml_value(deviation.value))
        table.add_row(Text(deviation.key), *map(Text, values), Text(deviation.reason))
    return table


def toml_lines(section: "Section", name: str = "", *, with_help: bool = False) -> Iterator[str]:
    """Write a section as TOML, plain keys before tables; `none` has no TOML, so those keys are commented out.

    Args:
        section: A configuration section.
        name: Its dotted name; empty for the root.
        with_help: Whether each key's help stands above it.

    Yields:
        The lines.
    """
    from reachrl.config.base import Section

    values = section.model_dump(mode="json")
    nested = {key: value for key in values if isinstance(value := getattr(section, key), Section)}
    if name:
        yield f"\n[{name}]"
    for key in [key for key in values if key not in nested]:
        if with_help:
            yield from (f"# {line}" for line in field_help(type(section), key).splitlines())
        prefix = "# " if values[key] is None else ""
        yield f"{prefix}{key} = {toml_value(values[key])}"
    for key, value in nested.items():
        yield from toml_lines(value, f"{name}.{key}" if name else key, with_help=with_help)


def field_help(section: type["Section"], key: str) -> str:
    """The docstring under a field, or under the one of the parent section that it gives another default."""
    fields = (getattr(parent, "model_fields", {}).get(key) for parent in section.__mro__)
    return next((field.description for field in fields if field is not None and field.description), "")


def toml_value(value: Any) -> str:
    """Write one value as it may be typed in a preset; a JSON string or list of plain values is valid TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
