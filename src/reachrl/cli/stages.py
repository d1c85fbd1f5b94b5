"""Shared by the stage commands: read the configuration, show progress, say how to resume."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from reachrl import torchrun
from reachrl.cli.display import Display
from reachrl.cli.terminal import say
from reachrl.errors import ConfigError

PresetArgument = Annotated[
    str,
    typer.Argument(metavar="PRESET", help="A preset's name, a TOML file or a run's config.json; see `reachrl list`."),
]
RunPresetArgument = Annotated[
    str | None,
    typer.Argument(metavar="PRESET", help="As for quickstart; left out: that of --run.", show_default=False),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the preset, such as algorithm.lr=1e-4 seed=1."),
]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run folder.", show_default="runs/PRESET")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings, errors and the result.")]


def stage_command(stage: str, about: str) -> Callable[..., None]:
    """A command that runs one stage; `about` is its help."""

    def command(
        preset: RunPresetArgument = None,
        overrides: OverridesArgument = None,
        run: RunOption = None,
        quiet: QuietOption = False,
    ) -> None:
        run_command(stage, preset, overrides, run, quiet)

    command.__doc__ = about
    return command


def run_command(
    stage: str | None,
    preset: str | None,
    overrides: list[str] | None,
    run: Path | None,
    quiet: bool,
    *,
    source: Path | None = None,
) -> Path:
    """Run one stage, or all of them in order, in one run folder.

    The configuration is read before torch is imported, so that mistakes in it are reported at once.

    Args:
        stage: A name of `reachrl.pipeline.STAGES`, or `None` for all.
        preset: Name or file of the preset, or `None` for the run's own configuration.
        overrides: `key=value` changes.
        run: The run folder, or `None` for `runs/<preset>`.
        quiet: Print only warnings and errors.
        source: The run, or the checkpoint, that a new run begins from.

    Returns:
        The run folder.

    Raises:
        typer.Exit: 130 after Ctrl-C, once the user knows how to resume.
    """
    from reachrl.config.loading import load_config, reset_by_kind

    torchrun.check()
    if source is not None and not (_run_of(source) / "config.json").is_file():
        raise ConfigError(
            f"--from {source}: there is no run at {_run_of(source)} (it has no config.json). Expected a run folder, or "
            "one of its checkpoints, such as runs/mine/checkpoints/step_000020"
        )
    preset, overrides = named_preset(preset, overrides, run, source and _run_of(source))
    config = load_config(preset, overrides)
    run_dir = run or Path("runs") / Path(preset).stem
    follower = torchrun.rank() > 0  # the leader speaks for all
    with interruptible(quiet or follower, run_dir) as display:
        for note in reset_by_kind(preset, overrides, config):
            display.log(f"note: {note}")
        if source is not None and not follower:
            from reachrl.pipeline.branch import branch

            branch(source, config, run_dir)
        from reachrl.pipeline import STAGES, run_stage

        for name in STAGES if stage is None else (stage,):
            run_stage(name, config, run_dir, display)
    return run_dir


def named_preset(preset: str | None, overrides: list[str] | None, *folders: Path | None) -> tuple[str, list[str]]:
    """The preset and the overrides that were typed; without a preset, the configuration of the first folder with one.

    Raises:
        ConfigError: neither a preset nor a run that has a configuration.
    """
    overrides = list(overrides or [])
    if preset is not None and "=" in preset:
        preset, overrides = None, [preset, *overrides]
    if preset is not None:
        return preset, overrides
    for folder in folders:
        if folder is not None and (folder / "config.json").is_file():
            return str(folder / "config.json"), overrides
    tried = next((folder for folder in folders if folder is not None), None)
    found = "" if tried is None else f"{tried} has no config.json. "
    raise ConfigError(
        f"which configuration? {found}Name a preset (see `reachrl list`), or the folder of a run that was begun"
    )


def _run_of(source: Path) -> Path:
    return source.parent.parent if source.parent.name == "checkpoints" else source


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


def _this_command() -> str:
    """The command line as it was typed, with the program's path as short as it was given."""
    program = Path(sys.argv[0])
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), *sys.argv[1:]])
