"""`reachrl train`: improve the warm-started policy with PPO."""

from reachrl.cli.stages import OverridesArgument, PresetArgument, QuietOption, RunOption, run_command


def train(
    preset: PresetArgument, overrides: OverridesArgument = None, run: RunOption = None, quiet: QuietOption = False
) -> None:
    """Improve the warm-started policy with online PPO; continues from the last checkpoint."""
    run_command("train", preset, overrides, run, quiet)
