"""`reachrl train`: improve the warm-started policy with PPO, extend a run, or branch from one."""

from pathlib import Path
from typing import Annotated

import typer

from reachrl.cli.stages import OverridesArgument, QuietOption, RunOption, RunPresetArgument, run_command
from reachrl.errors import ConfigError


def train(
    preset: RunPresetArgument = None,
    overrides: OverridesArgument = None,
    run: RunOption = None,
    until: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Train N iterations in all: more extend a finished run, fewer end one early."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Begin a new run from another's warm start, or from its checkpoints/step_N."
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Improve the warm-started policy with online RL (PPO, GRPO, RLOO); continues from the last checkpoint."""
    if source is not None and run is None:
        raise ConfigError("--from begins a new run: say where with --run")
    typed = [] if until is None else [f"num_iterations={until}"]
    run_command("train", preset, [*(overrides or []), *typed], run, quiet, source=source)
