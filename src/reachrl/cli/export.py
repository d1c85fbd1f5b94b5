"""`reachrl export`: a trained policy for other tools: adapters, alone or folded into their base, or whole weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reachrl.cli.terminal import Terminal
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.policies.openvla.export import Merge


def export(
    folder: Annotated[Path, typer.Argument(help="A policy folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapters into a copy of their base, and verify the result.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="For whole weights: an official checkpoint of their architecture, if the one they began as is gone.",
        ),
    ] = None,
) -> None:
    """Write a trained policy for other tools: adapters in peft's format, or whole weights in the official layout.

    A policy trained with adapters gives its adapters alone or, with --merge, whole weights in the layout of the base
    they were trained on, for example OpenVLA's own. They are read back and compared, number by number, with the base
    plus the product of the adapters' matrices; where rounding does not explain a difference, nothing is written.
    Adapters trained on a 4-bit base are folded into the base as it is stored, which is not exactly the policy that was
    trained; the difference is printed.

    A policy trained without adapters is written as an official checkpoint: configuration, other files and weights that
    are never read are those of the checkpoint it began as. Its critic is left out.
    """
    from reachrl.policies.lora.files import is_adapter

    console = Terminal()
    if base is not None and is_adapter(folder):
        raise ConfigError(f"--base is for whole weights; the adapters in {folder} name their base themselves")
    if merge:
        from reachrl.policies.openvla.export import export_merged

        with console.status("merging, then comparing"):
            _show(console, export_merged(folder, out), out)
    elif is_adapter(folder):
        from reachrl.policies.openvla.export import export_adapter

        export_adapter(folder, out)
        console.print(f"adapters written to {out}")
    else:
        from reachrl.policies.openvla.official_export import export_official

        with console.status("writing"):
            origin = export_official(folder, out, base=base)
        console.print(f"official checkpoint written to {out}, with the other files of {origin}; the critic is left out")


def _show(console: Terminal, result: "Merge", out: Path) -> None:
    console.print(f"merged checkpoint written to {out}")
    console.print(
        f"read back, each of its {result.check.num_weights} adapted weights is the base's plus the adapters' product "
        f"({result.check.change:.2g} of their length), rounded once"
    )
    if result.trained is not None:
        console.print(
            f"the adapters were trained on a 4-bit base: from that policy the merged one differs by "
            f"{result.trained:.2g} nats in the mean, as its weights are those that are stored. Evaluate it anew"
        )
