"""The `reachrl` command: its subcommands, and errors as one clear message with an exit code."""

import os
from typing import Any, NoReturn

import typer
import typer.core
from rich.text import Text

from reachrl import __version__, registry, torchrun
from reachrl.cli import config, eval, export, model, plan, quickstart, report, reward, robust, train
from reachrl.cli import list as listing
from reachrl.cli.failures import check_command_line, expected_failure, speak_any_language
from reachrl.cli.stages import stage_command
from reachrl.cli.terminal import Terminal, print_warnings, say
from reachrl.errors import ReachRLError
from reachrl.home import home_variables


class _InOrder(typer.core.TyperGroup):
    """Lists commands in the order of the story; typer alone would put groups last."""

    ORDER = (
        *("quickstart", "demos", "sft", "reward", "train", "eval", "robust", "report"),
        *("export", "list", "config", "plan", "model", "version"),
    )

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """The names, the known ones first."""
        return sorted(self.commands, key=lambda name: self.ORDER.index(name))

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command; what is said of a wrong word leaves out how the libraries call its kind."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    name="reachrl",
    cls=_InOrder,
    help="Online reinforcement learning for vision-language-action policies.",
    epilog="Start with: reachrl quickstart toy (a minute), or reachrl quickstart metaworld_quickstart (ten)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # an unexpected exception is our bug: the plain traceback serves best
    context_settings={"help_option_names": ["-h", "--help"]},
)

WHOLE, STAGES, LOOK = "The whole story", "Its stages, in order", "Look around"
app.command("quickstart", rich_help_panel=WHOLE)(quickstart.quickstart)
app.command("demos", rich_help_panel=STAGES)(
    stage_command("demos", "Collect demonstrations from scripted experts on training start states.")
)
app.command("sft", rich_help_panel=STAGES)(
    stage_command("sft", "Warm-start the policy on the demonstrations, keeping the best by held-out loss.")
)
app.add_typer(reward.app, name="reward", rich_help_panel=STAGES)
app.command("train", rich_help_panel=STAGES)(train.train)
app.command("eval", rich_help_panel=STAGES)(eval.eval_)
app.command("robust", rich_help_panel=STAGES)(robust.robust)
app.command("report", rich_help_panel=STAGES)(report.report)
app.command("export", rich_help_panel=LOOK)(export.export)
app.command("list", rich_help_panel=LOOK)(listing.list_)
app.command("config", rich_help_panel=LOOK)(config.config)
app.command("plan", rich_help_panel=LOOK)(plan.plan)
app.add_typer(model.app, name="model", rich_help_panel=LOOK)


@app.command(rich_help_panel=LOOK)
def version() -> None:
    """Print the installed version."""
    say(f"reachrl {__version__}")


def main() -> NoReturn:
    """Run the command line; a `ReachRLError` becomes a message on stderr and its own exit code."""
    speak_any_language()
    print_warnings()
    try:
        check_command_line()
        os.environ.update(home_variables())
        # A plug-in such as `my_lab.sim:MyEnv` is found beside where the command runs, without being installed.
        registry.search_here()
        app()
    except ReachRLError as error:
        show_error(error)
        torchrun.leave(error.exit_code)
    except SystemExit as end:  # how typer ends
        if isinstance(end.code, int):
            torchrun.leave(end.code)
        raise
    except Exception as error:
        told = expected_failure(error)
        if told is None:
            raise
        show_error(told)
        torchrun.leave(told.exit_code)
    torchrun.leave(0)


def show_error(error: ReachRLError) -> None:
    """Print what was wrong, in red where the terminal has colours."""
    Terminal(stderr=True).print(Text.assemble(("error: ", "bold red"), (str(error), "red")), soft_wrap=True)
