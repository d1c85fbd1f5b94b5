"""What every stage command does: read the configuration, show progress, say how to resume."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reachrl import torchrun
from reachrl.cli.display import Display
from reachrl.cli.terminal import say

if TYPE_CHECKING:
    from reachrl.config.train import TrainConfig

PresetArgument = Annotated[
    str,
    typer.Argument(metavar="PRESET", help="A preset's name, a TOML file or a run's config.json; see `reachrl list`."),
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the preset, such as ppo.lr=1e-4 seed=1.")
]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run folder.", show_default="runs/PRESET")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings, errors and the result.")]


def run_command(stage: str | None, preset: str, overrides: list[str] | None, run: Path | None, quiet: bool) -> Path:
    """Run one stage, or all of them in order, in one run folder.

    The configuration is read before torch is imported, so that a mistake in it is told at once.

    Args:
        stage: A name of `reachrl.pipeline.STAGES`, or `None` for all.
        preset: Name or file of the preset.
        overrides: `key=value` changes.
        run: The run folder, or `None` for `runs/<preset>`.
        quiet: Print only warnings and errors.

    Returns:
        The run folder.

    Raises:
        typer.Exit: 130 after Ctrl-C, once the user knows how to resume.
    """
    from reachrl.config.loading import load_config

    config = load_config(preset, overrides or [])
    run_dir = run or Path("runs") / Path(preset).stem
    follower = torchrun.rank() > 0  # the leader speaks for all
    with interruptible(quiet or follower, run_dir) as display:
        _run(stage, config, run_dir, display)
    return run_dir


@contextmanager
def interruptible(quiet: bool, folder: Path) -> Iterator[Display]:
    """Show progress while the block runs; after Ctrl-C say where its work is kept and how to resume.

    Args:
        quiet: Print only warnings and errors.
        folder: Where the work is kept.

    Raises:
        typer.Exit: 130 after Ctrl-C.
    """
    display = Display(quiet=quiet)
    try:
        with display.logging():
            yield display
    except KeyboardInterrupt:
        say(
            f"\nInterrupted; finished work is kept in {folder}. The same command resumes:\n  {_this_command()}",
            err=True,
        )
        raise typer.Exit(130) from None


def _run(stage: str | None, config: "TrainConfig", run_dir: Path, display: Display) -> None:
    from reachrl.pipeline import STAGES, run_stage

    for name in STAGES if stage is None else (stage,):
        run_stage(name, config, run_dir, display)


def _this_command() -> str:
    """The command line as it was typed, with the program's path as short as it was given."""
    program = Path(sys.argv[0])
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), *sys.argv[1:]])
