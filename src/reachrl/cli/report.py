"""`reachrl report`: draw report.html."""

from reachrl.cli.results import show_report
from reachrl.cli.stages import OverridesArgument, QuietOption, RunOption, RunPresetArgument, run_command


def report(
    preset: RunPresetArgument = None,
    overrides: OverridesArgument = None,
    run: RunOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write summary.json and report.html from what lies in the run folder; may be repeated."""
    show_report(run_command("report", preset, overrides, run, quiet))
