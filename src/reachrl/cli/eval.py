"""`reachrl eval`: success before and after a run, or of any policy by a benchmark's protocol."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from reachrl.cli.results import show_evaluations, show_result
from reachrl.cli.stages import QuietOption, RunOption, interruptible, run_command
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.config.protocols import Protocol
    from reachrl.pipeline.measure import Measurement

OWN = "Any policy, by any protocol"


def eval_(
    preset: Annotated[
        str | None,
        typer.Argument(metavar="PRESET", help="As for the other stages; left out: that of --run or around --policy."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as env.num_envs=4.")
    ] = None,
    run: RunOption = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A saved policy; else the run's, else policy.checkpoint.", rich_help_panel=OWN
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="All tasks of a LIBERO suite, with its step limit.", rich_help_panel=OWN)
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="heldout|official",
            help="The configuration's own start states and modes, or LIBERO's published protocol.",
            rich_help_panel=OWN,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Play one of N parts; the last to end merges.", rich_help_panel=OWN),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where outcomes go, the same for all shards.", rich_help_panel=OWN),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Measure success on held-out start states: of a run before and after training, or of any policy."""
    overrides = list(overrides or [])
    if preset is not None and "=" in preset:
        preset, overrides = None, [preset, *overrides]
    preset = preset or _preset_of(run, policy)
    if policy is None and suite is None and protocol is None:
        if shard or out:
            raise ConfigError("--shard and --out go with --protocol heldout or official")
        show_evaluations(run_command("eval", preset, overrides, run, quiet))
        return
    measurement = _measurement(preset, overrides, run, policy, suite, protocol or "heldout", shard or "1/1", out)
    from reachrl.pipeline.measure import measure

    with interruptible(quiet, measurement.out) as display:
        result = measure(measurement, display)
    show_result(result, measurement.out)


def _preset_of(run: Path | None, policy: Path | None) -> str:
    """The configuration of a run, given itself or by the policy it trained."""
    for folder in (run, policy.parent if policy else None):
        if folder is not None and (folder / "config.json").is_file():
            return str(folder / "config.json")
    raise ConfigError(
        "reachrl eval needs a preset (see `reachrl list`), or --run or --policy of a run that has its config.json"
    )


def _measurement(
    preset: str,
    overrides: list[str],
    run: Path | None,
    policy: Path | None,
    suite: str | None,
    protocol: str,
    shard: str,
    out: Path | None,
) -> "Measurement":
    from reachrl.config.protocols import PROTOCOLS, evaluation_config
    from reachrl.run.cores import available_cores
    from reachrl.run.file_names import file_name

    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol}: expected {' or '.join(PROTOCOLS)}")
    known = cast("Protocol", protocol)
    config = evaluation_config(preset, overrides, suite=suite, protocol=known, cores=available_cores())
    if policy is None and run is not None:
        policy = run / "policy"
    if policy is None and getattr(config.policy, "checkpoint", None) is None:
        raise ConfigError("no policy to evaluate: give --policy, --run of a finished run, or policy.checkpoint=...")
    if policy is not None and not policy.is_dir():
        raise ConfigError(f"there is no policy in {policy}: has `reachrl train` finished there?")
    trained_in = policy.parent if policy and (policy.parent / "config.json").is_file() else None
    folder = out or (trained_in or Path("runs")) / file_name(getattr(config.env, "suite", config.env.kind), f"-{known}")
    from reachrl.pipeline.measure import Measurement

    return Measurement(config=config, protocol=known, policy=policy, out=folder, shard=_shard(shard))


def _shard(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, for example 1/4")
