"""`reachrl demos`: collect demonstrations."""

from reachrl.cli.stages import OverridesArgument, QuietOption, RunOption, RunPresetArgument, run_command


def demos(
    preset: RunPresetArgument = None,
    overrides: OverridesArgument = None,
    run: RunOption = None,
    quiet: QuietOption = False,
) -> None:
    """Collect demonstrations from scripted experts on training start states."""
    run_command("demos", preset, overrides, run, quiet)
