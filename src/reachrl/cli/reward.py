"""`reachrl reward`: the process reward model."""

import typer

from reachrl.cli.reward_inspect import inspect
from reachrl.cli.reward_segments import segments
from reachrl.cli.stages import stage_command

app = typer.Typer(help="Fit and look into the process reward model: fit, segments, inspect.", no_args_is_help=True)


@app.callback()
def reward() -> None:
    """The process reward model."""


app.command("fit")(
    stage_command(
        "reward", "Fit P(progress | frame, instruction) on demonstrations and on the warm-started policy's failures."
    )
)
app.command()(segments)
app.command()(inspect)
