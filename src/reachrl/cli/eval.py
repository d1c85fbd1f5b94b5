"""`reachrl eval`: success before and after a run, or of any policy by a benchmark's protocol."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from reachrl.cli.results import show_best_of, show_evaluations, show_result
from reachrl.cli.stages import QuietOption, RunOption, interruptible, named_preset, run_command
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
            metavar="WHICH",
            help="heldout: the configuration's own start states and modes; official: LIBERO's published protocol.",
            rich_help_panel=OWN,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="latest|best|N",
            help="The policy in a checkpoint of --run: the last, the best by validation, or iteration N.",
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
    best_of: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4,8",
            help="Carry out the best of N sampled actions a decision, for each N; paired with N = 1.",
            rich_help_panel=OWN,
        ),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="What makes an action the best: logprob, vote, mean (all are averaged), critic or reward; the last "
            "two look ahead in a copy of the simulator.",
            rich_help_panel=OWN,
        ),
    ] = "logprob",
    quiet: QuietOption = False,
) -> None:
    """Measure success on held-out start states: of a run before and after training, or of any policy."""
    if checkpoint is not None:
        if run is None or policy is not None:
            raise ConfigError("--checkpoint names one of --run's checkpoints, and goes without --policy")
        policy = chosen_checkpoint(run, checkpoint) / "policy"
    preset, overrides = named_preset(preset, overrides, run, policy.parent if policy else None)
    if best_of is not None:
        if shard or protocol == "official":
            raise ConfigError("--best-of goes with --protocol heldout, without --shard")
        measurement = _measurement(preset, overrides, run, policy, suite, "heldout", "1/1", out)
        _best_of(measurement, best_of, rank, quiet)
        return
    if policy is None and suite is None and protocol is None:
        if shard or out:
            raise ConfigError("--shard and --out go with --protocol heldout or official")
        show_evaluations(run_command("eval", preset, overrides, run, quiet))
        return
    measurement = _measurement(preset, overrides, run, policy, suite, protocol or "heldout", shard or "1/1", out)
    from reachrl.pipeline.measure import measure

    with interruptible(quiet, measurement.out) as display:
        if checkpoint is not None and policy is not None:
            done = checkpoint_iteration(policy.parent)
            display.log(f"checkpoint {policy.parent.name}: {done} of {measurement.config.num_iterations} iterations")
        result = measure(measurement, display)
    show_result(result, measurement.out)


def _best_of(measurement: "Measurement", counts: str, rank: str, quiet: bool) -> None:
    from reachrl.pipeline.best_of import MOST, measure_best_of
    from reachrl.rollout.best_of import RANKS

    if rank not in RANKS:
        raise ConfigError(f"--rank {rank}: expected {', '.join(RANKS[:-1])} or {RANKS[-1]}")
    numbers = [part.strip() for part in counts.split(",")]
    if not all(part.isdecimal() and 1 <= int(part[:9]) <= MOST for part in numbers):
        raise ConfigError(f"--best-of {counts}: expected numbers from 1 to {MOST}, such as 1,2,4,8")
    with interruptible(quiet, measurement.out) as display:
        result = measure_best_of(
            measurement.config, measurement.policy, measurement.out, [int(part) for part in numbers], rank, display
        )
    show_best_of(result, measurement.out)


def chosen_checkpoint(run: Path, which: str) -> Path:
    """One of a run's checkpoints.

    Args:
        run: the run folder.
        which: `latest`, `best` (by the validation curve) or the number of an iteration.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    from reachrl.run.checkpoint import checkpoint_step, list_checkpoints
    from reachrl.run.metrics import read_metrics

    kept = {checkpoint_step(folder): folder for folder in list_checkpoints(run / "checkpoints")}
    if not kept:
        raise ConfigError(
            f"{run} has no checkpoints yet. `reachrl train --run {run}` begins or goes on with training and writes one "
            "every checkpoint_every iterations; without --checkpoint a finished run is evaluated"
        )
    there = f"there are checkpoints of iterations {', '.join(map(str, kept))}"
    if which == "latest":
        return kept[max(kept)]
    if which == "best":
        if (run / "checkpoints" / "best" / "policy").is_dir():
            return run / "checkpoints" / "best"
        curve = {record["iteration"]: record["rate"] for record in read_metrics(run / "metrics.jsonl", "validation")}
        judged = {step: curve[step] for step in kept if step in curve}
        if not judged:
            raise ConfigError(
                f"{run}: no checkpoint was judged on validation starts ({there}); best needs training with "
                "eval.during_every. Use --checkpoint latest"
            )
        return kept[max(judged, key=lambda step: (judged[step], step))]
    if not which.isdecimal() or int(which[:9]) not in kept:
        raise ConfigError(f"--checkpoint {which}: expected latest, best or an iteration; {there}")
    return kept[int(which)]


def checkpoint_iteration(folder: Path) -> int:
    """The iterations that the weights of a checkpoint, or of `checkpoints/best`, were trained for."""
    from reachrl.run.checkpoint import checkpoint_step
    from reachrl.run.records import BestPoint, read_record

    if folder.name != "best":
        return checkpoint_step(folder)
    point = read_record(folder / "validation.json", BestPoint, remedy="use --checkpoint latest")
    return int(point["iteration"])


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
    step = policy.parent.name if policy and policy.parent.parent.name == "checkpoints" else None
    home = policy.parents[2] if policy and step else policy.parent if policy else None
    trained_in = home if home and (home / "config.json").is_file() else None
    ending = f"-{known}" + (f"-{step}" if step else "")
    folder = out or (trained_in or Path("runs")) / file_name(getattr(config.env, "suite", config.env.kind), ending)
    from reachrl.pipeline.measure import Measurement

    return Measurement(config=config, protocol=known, policy=policy, out=folder, shard=_shard(shard))


def _shard(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, for example 1/4")
