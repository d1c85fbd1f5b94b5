"""Which keys may change when a run is resumed, by their marks, and which stages must then run again."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reachrl.config.marks import Affects, marks
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.run.checkpoint import checkpoint_step, latest_checkpoint, list_checkpoints
from reachrl.run.configuration import ABSENT, Change, Permit
from reachrl.run.stages import StageRecords

log = logging.getLogger(__name__)

_STAGES = {
    Affects.DATA: "demos",
    Affects.ARCHITECTURE: "sft",
    Affects.WARM_START: "sft",
    Affects.REWARD_MODEL: "reward",
    Affects.TRAINING: "train",
    Affects.EVALUATION: "eval",
    Affects.PROTOCOL: "eval",
}
_AFTER_TRAINING = ("train", "eval", "report")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    finished: frozenset[str]
    """Stages that made what later ones build on."""
    begun: frozenset[str]
    """Those, and stages that would go on from what an interrupted attempt left."""
    iterations: int
    """Training iterations in the last checkpoint."""


def progress_of(path: Path) -> Progress:
    """How far the run in `path` has come, by its stage records and checkpoints."""
    records = StageRecords(path / "stages.json").read()
    finished = {name for name, record in records.items() if record["done"] and not made_nothing(record)}
    latest = latest_checkpoint(path / "checkpoints")
    left = {"sft": path / "sft" / "checkpoint", "eval": path / "eval" / "before.json"}
    begun = finished | {name for name, file in left.items() if file.exists()} | ({"train"} if latest else set())
    return Progress(frozenset(finished), frozenset(begun), checkpoint_step(latest) if latest else 0)


def made_nothing(record: dict) -> bool:
    """Whether a finished stage had nothing to do, because no demonstrations or no reward model were needed."""
    info = record.get("info") or {}
    return info.get("trajectories") == 0 or info.get("fitted") is False


def permit(config: TrainConfig) -> Permit:
    """Judges the changes that make a run's configuration `config`; more iterations open a finished training again."""

    def judge(path: Path, changes: list[Change]) -> None:
        progress = progress_of(path)
        more = config.num_iterations - progress.iterations
        if more < 0:
            raise ConfigError(
                f"run {path} has trained {progress.iterations} iterations, num_iterations={config.num_iterations} were "
                f"asked for. `reachrl train --run {path}` goes on with the run's own configuration; `--from` an "
                "earlier checkpoint starts another run."
            )
        longer = {"num_iterations", "eval.patience"} & {change.key for change in changes}
        extended = more > 0 and bool(longer) and "train" in progress.finished
        if extended:
            progress = replace(progress, finished=progress.finished - {*_AFTER_TRAINING})
        check_changes(config, changes, progress, where=f"run {path}")
        log.info("%s goes on with another configuration: %s", path, "; ".join(map(str, changes)))
        if extended:
            _open_again(path, config, progress.iterations)

    return judge


def check_changes(config: TrainConfig, changes: Sequence[Change], progress: Progress, *, where: str) -> None:
    """Check that no change contradicts finished work or comes too late to take effect.

    Args:
        config: the configuration with the changes.
        changes: what differs from the one that the run has.
        progress: of the run.
        where: begins the message.

    Raises:
        ConfigError: lists the changes that may not be made, each with the reason.
    """
    found = marks(config)
    problems = [(change, why) for change in changes if (why := _refusal(_mark(found, change.key), progress))]
    # Options that one kind has and the other has not say no more than that the kind is another.
    other_kinds = tuple(change.key.removesuffix("kind") for change in changes if change.key.endswith(".kind"))
    problems = [
        (change, why)
        for change, why in problems
        if not (change.key.startswith(other_kinds) and ABSENT in (change.old, change.new))
    ]
    if problems:
        lines = [f"  {change} ({why})" for change, why in problems[:20]]
        lines += [f"  ... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ConfigError(
            "\n".join([f"{where} was made with another configuration:", *lines])
            + "\nUse the same values to go on, or begin another run: with another --run, or with `reachrl train --from "
            "RUN --run NEW` from a run's warm start or checkpoint, where only training differs."
        )


def _mark(found: dict[str, Affects], key: str) -> Affects:
    """The mark of a key, or what its section's kind decides if another kind has no such key."""
    while key not in found and "." in key:
        section = key.rpartition(".")[0]
        key = f"{section}.kind" if f"{section}.kind" in found else section
    return found.get(key, Affects.EVERYTHING)


def _refusal(mark: Affects, progress: Progress) -> str | None:
    """Why a key with this mark may not change, or None if it may."""
    stages = {stage for kind, stage in _STAGES.items() if kind in mark}
    if not stages:
        return None
    if Affects.FUTURE in mark:
        return None if stages - progress.finished else f"it acts in {_named(stages)}, and that has finished"
    begun = stages & progress.begun
    return f"it decided what {_named(begun)} made" if begun else None


def _named(stages: Iterable[str]) -> str:
    order = list(dict.fromkeys(_STAGES.values()))
    return " and ".join(f"stage {name!r}" for name in sorted(stages, key=order.index))


def _open_again(path: Path, config: TrainConfig, iterations: int) -> None:
    StageRecords(path / "stages.json").reopen(_AFTER_TRAINING)
    if config.collect_ahead and iterations % config.checkpoint_every:
        # Nothing was collected ahead across the final checkpoint, where a longer run would have collected ahead.
        shutil.rmtree(list_checkpoints(path / "checkpoints")[-1])


def forget_results(path: Path) -> None:
    """Delete the evaluation and report of an earlier, shorter training."""
    results = (path / "eval" / "after.json", path / "eval" / "best.json", path / "conversation.json")
    for file in (*results, path / "summary.json"):
        file.unlink(missing_ok=True)
    for film in (path / "videos").glob("after_*.mp4"):
        film.unlink()
