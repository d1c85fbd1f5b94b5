"""`reachrl model`: what a checkpoint folder holds, and whether it computes what the official code computed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from reachrl.cli.terminal import Terminal

if TYPE_CHECKING:
    from reachrl.config.towers import TowerConfig
    from reachrl.policies.openvla.inspection import AdapterInfo, CheckpointInfo

app = typer.Typer(help="Checkpoint folders.", no_args_is_help=True)
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint's folder.")]
_LAYOUTS = {
    "official": "the official OpenVLA layout",
    "prismatic": "the official OpenVLA layout, weights under Prismatic's own names",
    "reachrl": "written by ReachRL",
}
_BYTES = {"bfloat16": 2, "float32": 4}


@app.callback()
def model() -> None:
    """Checkpoint folders."""


@app.command()
def info(folder: FolderArgument) -> None:
    """Show sizes, weights, statistics, prompt and memory of a checkpoint. Reads headers only, never the weights."""
    from reachrl.policies.openvla.inspection import AdapterInfo, inspect_folder

    console, found = Terminal(), inspect_folder(folder)
    if isinstance(found, AdapterInfo):
        console.print(_adapter(found))
        if not Path(found.base).is_dir():
            return
        console.print("\nThe base:")
        found = inspect_folder(Path(found.base))
    for table in (_adapter(found),) if isinstance(found, AdapterInfo) else _whole(found):
        console.print(table)


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
) -> None:
    """Compute recorded outputs of the official code again; exit code 1 if one does not agree or was not recorded."""
    heads = None if tower_heads is None else _heads(tower_heads)
    from reachrl.policies.openvla.verify import verify

    result = verify(folder, recorded, dataset=dataset, tower_heads=heads)
    table = _table("Recorded and computed again", "tensor", "largest difference", "tolerance", "")
    for check in result.checks:
        exact = check.name == "tokens"
        table.add_row(
            check.name,
            f"{check.difference:.0f} differ" if exact else f"{check.difference:.1e}",
            "exact" if exact else f"{check.tolerance:.0e}",
            Text("pass", "green") if check.passed else Text("FAIL", "bold red"),
        )
    console = Terminal()
    console.print(table)
    if result.missing:
        text = f"FAIL: the function is not verified without {', '.join(result.missing)}; record them too"
        console.print(Text(text, "bold red"))
    if result.ignored:
        console.print(f"Not compared: {', '.join(result.ignored)}", highlight=False)
    if not result.passed:
        raise typer.Exit(1)


def _heads(text: str) -> list[int]:
    from reachrl.errors import ConfigError

    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--tower-heads {text!r}: expected one number for each tower, such as 16,16")
    return [int(number) for number in numbers]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = any(columns)
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _whole(found: "CheckpointInfo") -> tuple[Table, ...]:
    return _facts(found), _parts(found), _memory(found)


def _facts(found: "CheckpointInfo") -> Table:
    from reachrl.policies.openvla.inspection import EXAMPLE, prompt_of

    config = found.config
    dims = ", ".join(f"{name} ({dim})" for name, dim in found.action_dims.items())
    facts = {
        "layout": _LAYOUTS[found.layout] + _oft(found.oft_signal),
        "image": f"{config.image_size} x {config.image_size} pixels ({config.resize}), {config.num_patches} patches",
        "stored as": _dtypes(found.dtypes),
        "statistics": f"{dims} action dimensions" if dims else "none",
        "prompt": repr(prompt_of("{instruction}")),
        "example": repr(prompt_of(EXAMPLE)),
        "its tokens": "no tokenizer.json" if found.prompt_ids is None else " ".join(map(str, found.prompt_ids)),
    }
    table = _table(f"{found.folder}", "", "")
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def _parts(found: "CheckpointInfo") -> Table:
    table = _table("\nWeights", "part", "sizes", "stored", "never read")
    sizes = _sizes(found)
    for part in found.parts:
        table.add_row(part.name, sizes.get(part.name, ""), f"{part.num_weights:,}", f"{part.num_unread:,}")
    table.add_row(
        "all", f"{found.num_live:,} are read", f"{found.num_weights:,}", f"{found.num_weights - found.num_live:,}"
    )
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    table.columns[1].ratio = 1
    return table


def _sizes(found: "CheckpointInfo") -> dict[str, str]:
    """What can be said about the sizes of each part."""
    config, llm = found.config, found.config.language_model
    sizes = {f"tower {i + 1}": _tower(tower, heads_known=found.heads_known) for i, tower in enumerate(config.towers)}
    for i, name in enumerate(found.tower_names):
        sizes[f"tower {i + 1}"] = f"{name}: {sizes[f'tower {i + 1}']}"
    sizes["language model"] = (
        f"Llama: width {llm.hidden_size}, {llm.num_layers} layers, {llm.num_heads} heads "
        f"({llm.num_kv_heads or llm.num_heads} for keys), MLP {llm.intermediate_size}, vocabulary {llm.vocab_size}, "
        f"action tokens {llm.vocab_end - 256}..{llm.vocab_end - 1}"
    )
    sizes["projector"] = f"{config.vision_width} to {llm.hidden_size}"
    return sizes


def _tower(tower: "TowerConfig", *, heads_known: bool) -> str:
    if tower.kind == "conv":
        return "convolutions " + "-".join(str(stage.channels) for stage in tower.stages)
    heads = f"{tower.num_heads} heads" if heads_known else "heads unknown"
    tokens = ", class token" * tower.class_token + f", {tower.num_registers} registers" * bool(tower.num_registers)
    return (
        f"ViT: width {tower.width}, {tower.depth} blocks ({tower.depth - 1} read), {heads}, MLP {tower.mlp_width}, "
        f"patches of {tower.patch_size} pixels{tokens}"
    )


def _memory(found: "CheckpointInfo") -> Table:
    table = _table("\nMemory in GB", "", *_BYTES)
    length, cache = found.sequence_length, found.num_cached
    for name, numbers in {
        "weights that are read": found.num_live,
        f"cache of one row of {length} positions": cache,
    }.items():
        table.add_row(name, *(f"{numbers * size / 1e9:.3f}" for size in _BYTES.values()))
    return table


def _adapter(found: "AdapterInfo") -> Table:
    table = _table(f"{found.folder}", "", "")
    for name, fact in {
        "layout": "peft adapters (LoRA), no whole weights" + _oft(found.oft_signal),
        "base": found.base,
        "rank, alpha": f"{found.rank}, {found.alpha:g}",
        "adapted": ", ".join(found.targets),
        "weights": f"{found.num_weights:,}",
        "stored as": _dtypes(found.dtypes),
    }.items():
        table.add_row(name, fact)
    return table


def _oft(signal: str | None) -> str:
    return "" if signal is None else f"; OpenVLA-OFT by {signal}: another function, it cannot be loaded"


def _dtypes(dtypes: dict[str, int]) -> str:
    return ", ".join(dtypes) if len(dtypes) == 1 else ", ".join(f"{name} ({n:,} weights)" for name, n in dtypes.items())
