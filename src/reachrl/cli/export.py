"""`reachrl export`: a trained policy for other tools: adapters, alone or folded into their base, or whole weights."""

from pathlib import Path
from typing import Annotated

import typer

from reachrl.cli.terminal import Terminal


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
    from reachrl.policies.folders import folders_of

    console = Terminal()
    found, folders = folders_of(folder)
    with console.status("writing"):
        lines = folders.export(found, out, merge=merge, base=base)
    for line in lines:
        console.print(line)
