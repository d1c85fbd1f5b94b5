"""The `reachrl` command: its subcommands, and errors as one clear message with an exit code."""

import sys
from importlib.metadata import version as installed_version
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from reachrl.cli import config, demos, eval, listing, quickstart, report, reward, sft, train
from reachrl.errors import ReachRLError

app = typer.Typer(
    name="reachrl",
    help="Online reinforcement learning for vision-language-action policies.",
    epilog="Start with: reachrl quickstart metaworld_quickstart --run runs/quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected exception is our bug: the plain traceback serves best
    context_settings={"help_option_names": ["-h", "--help"]},
)

LOOK, STAGES, WHOLE = "Look around", "Stages, in their order", "Everything"
app.command("list", rich_help_panel=LOOK)(listing.list_)
app.command("config", rich_help_panel=LOOK)(config.config)
app.command("demos", rich_help_panel=STAGES)(demos.demos)
app.command("sft", rich_help_panel=STAGES)(sft.sft)
app.add_typer(reward.app, name="reward", rich_help_panel=STAGES)
app.command("train", rich_help_panel=STAGES)(train.train)
app.command("eval", rich_help_panel=STAGES)(eval.eval_)
app.command("report", rich_help_panel=STAGES)(report.report)
app.command("quickstart", rich_help_panel=WHOLE)(quickstart.quickstart)


@app.command(rich_help_panel=LOOK)
def version() -> None:
    """Print the installed version."""
    typer.echo(f"reachrl {installed_version('reachrl')}")


def main() -> NoReturn:
    """Run the command line; a `ReachRLError` becomes a message on stderr and its own exit code."""
    try:
        app()
    except ReachRLError as error:
        show_error(error)
        sys.exit(error.exit_code)
    sys.exit(0)


def show_error(error: ReachRLError) -> None:
    """Print what was wrong, in red where the terminal has colours."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), (str(error), "red")), soft_wrap=True)
