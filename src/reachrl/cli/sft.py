"""`reachrl sft`: warm-start the policy on the demonstrations."""

from reachrl.cli.stages import OverridesArgument, QuietOption, RunOption, RunPresetArgument, run_command


def sft(
    preset: RunPresetArgument = None,
    overrides: OverridesArgument = None,
    run: RunOption = None,
    quiet: QuietOption = False,
) -> None:
    """Warm-start the policy on the demonstrations, keeping the best by held-out loss."""
    run_command("sft", preset, overrides, run, quiet)
