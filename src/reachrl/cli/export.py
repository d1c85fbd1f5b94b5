"""`reachrl export`: adapters for other tools, alone or folded into their base."""

from pathlib import Path
from typing import Annotated

import typer

from reachrl.cli.terminal import Terminal


def export(
    folder: Annotated[Path, typer.Argument(help="A policy folder with adapters.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapters into a copy of their base, and verify the result.")
    ] = False,
) -> None:
    """Write a trained policy for other tools: its adapters in peft's format, or (--merge) whole weights.

    Whole weights have the layout of the base they were trained on, for example OpenVLA's own. They are compared
    with what peft computes from base and adapters on the same frames, in float32 (4 bytes of memory a weight); when the
    two disagree by more than rounding explains, nothing is written.
    Adapters trained on a 4-bit base are folded into the base as it is stored, which is not exactly the policy that was
    trained; the difference is printed.
    """
    from reachrl.policies.openvla.export import export_adapter, export_merged

    console = Terminal()
    if not merge:
        export_adapter(folder, out)
        console.print(f"adapters written to {out}")
        return
    with console.status("merging, then comparing"):
        result = export_merged(folder, out)
    console.print(f"merged checkpoint written to {out}")
    console.print(
        f"log-probabilities differ from peft's by {result.difference:.2g} nats in the mean (allowed "
        f"{result.tolerance:.2g}; the adapters change them by {result.effect:.2g}, rounding to the base's type by "
        f"{result.rounding:.2g}); {result.same_tokens:.0%} of the greedy tokens are equal"
    )
    if result.trained is not None:
        console.print(
            f"the adapters were trained on a 4-bit base: from that policy the merged one differs by "
            f"{result.trained:.2g} nats in the mean, as its weights are those that are stored. Evaluate it anew"
        )
