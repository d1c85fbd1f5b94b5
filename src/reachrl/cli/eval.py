"""`reachrl eval`: success on held-out start states, before and after."""

from reachrl.cli.results import show_evaluations
from reachrl.cli.stages import OverridesArgument, PresetArgument, QuietOption, RunOption, run_command


def eval_(
    preset: PresetArgument, overrides: OverridesArgument = None, run: RunOption = None, quiet: QuietOption = False
) -> None:
    """Measure success on held-out start states, before and after training."""
    show_evaluations(run_command("eval", preset, overrides, run, quiet))
