"""`reachrl robust`: success under perturbations, before and after training, on the same episodes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reachrl.cli.results import show_robustness
from reachrl.cli.stages import QuietOption, interruptible, named_preset
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.config.train import TrainConfig
    from reachrl.pipeline.conditions import Conditions

_EPISODES = 5


def robust(
    target: Annotated[Path, typer.Argument(metavar="POLICY_OR_RUN", help="A finished run, or a saved policy.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as env.num_envs=4.")
    ] = None,
    named: Annotated[
        str | None,
        typer.Option("--preset", metavar="PRESET", help="The configuration, where none lies around the policy."),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The saved policy to compare with.", show_default="the run's warm start"),
    ] = None,
    suite: Annotated[
        Literal["own", "plus", "pro"],
        typer.Option(help="The environment's own axes, or the tasks of LIBERO-Plus or LIBERO-PRO."),
    ] = "own",
    axes: Annotated[
        str | None,
        typer.Option(metavar="camera,light=1", help="Which axes, or single levels of them.", show_default="all"),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(min=1, help="Start states a task, each at every level; own axes.", show_default=str(_EPISODES)),
    ] = None,
    sample: Annotated[
        str | None, typer.Option(metavar="1/10", help="Share of a suite's tasks that is played.", show_default="all")
    ] = None,
    protocol: Annotated[
        Literal["corrected", "upstream"] | None,
        typer.Option(
            metavar="WHICH",
            help="How a suite's episodes begin: corrected, or upstream, as published figures.",
            show_default="corrected",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where outcomes go; else a folder robust in the run."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Measure success under perturbations the policy was not trained on, beside the same episodes unperturbed."""
    config, policies, run = measured(target, before, named, list(overrides or []))
    from reachrl.pipeline.robust import Robustness, measure_robustness

    if suite == "own":
        given = {"--sample": sample, "--protocol": protocol}
        if misplaced := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{misplaced[0]} belongs to published suites: add  --suite plus  or  --suite pro")
        conditions, folder = _own(config, axes, episodes or _EPISODES), "robust"
    else:
        if episodes is not None:
            raise ConfigError("--episodes: a published suite has its own; --sample 1/10 plays a share of them")
        protocol = protocol or "corrected"
        conditions, folder = _published(config, suite, axes, sample or "1", protocol), f"robust-{suite}-{protocol}"
    folder = out or (run or target) / folder
    with interruptible(quiet, folder) as display:
        result = measure_robustness(
            Robustness(config=config, policies=policies, conditions=conditions, out=folder), display
        )
    show_robustness(result, folder)
    if run is not None and folder == run / "robust" and (run / "summary.json").is_file():
        from reachrl.report.report import write_report

        write_report(run)


def _own(config: "TrainConfig", axes: str | None, episodes: int) -> "Conditions":
    from reachrl.pipeline.conditions import own_conditions

    if episodes > config.env.num_eval_starts:
        raise ConfigError(f"--episodes {episodes}: there are env.num_eval_starts={config.env.num_eval_starts}")
    return own_conditions(config.env, axes, episodes, config.eval.seed)


def _published(
    config: "TrainConfig",
    suite: Literal["plus", "pro"],
    axes: str | None,
    sample: str,
    protocol: Literal["corrected", "upstream"],
) -> "Conditions":
    from reachrl.pipeline.published import plus_conditions, sample_share
    from reachrl.pipeline.published_pro import pro_conditions

    conditions = plus_conditions if suite == "plus" else pro_conditions
    return conditions(config.env, protocol, axes, sample_share(sample), config.eval.seed)


def measured(
    target: Path, before: Path | None, preset: str | None, overrides: list[str]
) -> tuple["TrainConfig", dict[str, Path], Path | None]:
    """The configuration, the policies by name, and the run whose card this fills.

    Args:
        target: a run folder, or the folder of a saved policy.
        before: a saved policy to compare with.
        preset: the configuration; None: the one around `target`.
        overrides: `key=value` changes.

    Raises:
        ConfigError: there is no policy, or no configuration for it.
    """
    from reachrl.config.loading import load_config

    around = [target, *target.resolve().parents[:3]]
    run = next((folder for folder in around if (folder / "stages.json").is_file()), None)
    name, overrides = named_preset(preset, overrides, run, target.parent)
    config = load_config(name, overrides)
    is_run = run == target
    policies = {"after": target / "policy" if is_run else target}
    if before is not None or is_run:
        policies = {"before": before or target / "sft" / "policy", **policies}
    for called, folder in policies.items():
        if not any(folder.glob("*.safetensors")):
            hint = "has `reachrl train` finished there?" if is_run else "expected the folder of a saved policy"
            raise ConfigError(f"there is no policy ({called}) in {folder}; {hint}")
    return config, policies, run if is_run else None
