"""`reachrl quickstart`: every stage in order, from nothing to a report."""

from reachrl.cli.results import show_evaluations, show_report
from reachrl.cli.stages import OverridesArgument, PresetArgument, QuietOption, RunOption, run_command


def quickstart(
    preset: PresetArgument = "metaworld_quickstart",
    overrides: OverridesArgument = None,
    run: RunOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run the whole story: demos, sft, reward fit, train, eval, report. Finished stages are skipped."""
    run_dir = run_command(None, preset, overrides, run, quiet)
    show_evaluations(run_dir)
    show_report(run_dir)
