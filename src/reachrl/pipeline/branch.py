"""Branching: a new run that starts from another run's warm start or checkpoint."""

import os
import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from reachrl.config.loading import config_dict, is_default
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.pipeline.resumption import Progress, check_changes, progress_of
from reachrl.run.atomic import jsonable, replace_folder_atomic, write_json_atomic
from reachrl.run.checkpoint import checkpoint_step, verify_checkpoint
from reachrl.run.configuration import config_changes, read_config
from reachrl.run.metrics import MetricsLog, read_metrics
from reachrl.run.records import AnyObject, read_record
from reachrl.run.stages import StageRecords
from reachrl.validation import BEST, SAVED_BEST

_WARM = ("demos", "sft", "reward")


def branch(source: Path, config: TrainConfig, run_dir: Path) -> None:
    """Make a run folder with the demonstrations, warm start and reward model of another run, and perhaps a checkpoint.

    Files are linked where the file system can, else copied. Where the folder was made so before, nothing happens: the
    run is resumed.

    Args:
        source: a run folder, or one of its `checkpoints/step_N`.
        config: of the new run; it may differ where the marks of its keys permit.
        run_dir: the new run folder.

    Raises:
        ConfigError: `source` is no run with a warm start, `config` changes what is taken over, or `run_dir` is taken.
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = source if source.parent.name == "checkpoints" else None
    run = (checkpoint.parent.parent if checkpoint else source).resolve()
    origin = _origin(run, checkpoint)
    if run_dir.exists():
        known = _provenance(run_dir).get("from", {})
        if all(known.get(key) == origin[key] for key in ("run", "checkpoint")):
            return
        raise ConfigError(
            f"{run_dir} exists and is no branch of {source}; choose another --run, or resume it without --from"
        )
    progress = progress_of(run)
    if "sft" not in progress.finished:
        raise ConfigError(f"--from {source}: the warm start (stage 'sft') has not finished there")
    warm = progress.finished & {*_WARM}
    begun = warm | ({"train"} if checkpoint else set())
    changes = config_changes(read_config(run), jsonable(config_dict(config)), partial(is_default, config))
    check_changes(config, changes, Progress(warm, frozenset(begun), origin["iteration"]), where=f"run {run}")
    if checkpoint:
        verify_checkpoint(checkpoint)
        if config.num_iterations < origin["iteration"]:
            raise ConfigError(
                f"--from {source}: num_iterations={config.num_iterations} were over before this checkpoint: raise it"
            )
    origin["changes"] = {change.key: [_plain(change.old), _plain(change.new)] for change in changes}

    def fill(aside: Path) -> None:
        write_json_atomic(aside / "config.json", jsonable(config_dict(config)))
        write_json_atomic(aside / "provenance.json", {"from": origin})
        records = StageRecords(run / "stages.json").read()
        write_json_atomic(aside / "stages.json", {name: records[name] for name in _WARM if name in records})
        for folder in ("demos", "sft", "reward_model"):
            left_out = () if checkpoint else ("version_*", "fresh")  # refits belong to the training of the other run
            if (run / folder).is_dir():
                shutil.copytree(
                    run / folder, aside / folder, copy_function=_link, ignore=shutil.ignore_patterns(*left_out)
                )
        if checkpoint:
            shutil.copytree(checkpoint, aside / "checkpoints" / checkpoint.name, copy_function=_link)
            for name in (BEST, SAVED_BEST):  # the resume decides which of them, if any, its points are of
                if (run / "checkpoints" / name).is_dir():
                    shutil.copytree(run / "checkpoints" / name, aside / "checkpoints" / name, copy_function=_link)
        log = MetricsLog(aside / "metrics.jsonl")
        for record in read_metrics(run / "metrics.jsonl"):
            if record["kind"] in ("demos", "sft", "reward_model") or (
                record["kind"] in ("train", "validation") and record["iteration"] < origin["iteration"]
            ):
                log.log(record)
        log.close()

    run_dir.parent.mkdir(parents=True, exist_ok=True)
    replace_folder_atomic(run_dir, fill)


def _origin(run: Path, checkpoint: Path | None) -> dict[str, Any]:
    if not (run / "config.json").is_file():
        raise ConfigError(f"--from {checkpoint or run}: expected a run folder, or one of its checkpoints/step_N")
    if checkpoint is not None and not checkpoint.is_dir():
        raise ConfigError(f"--from {checkpoint}: there is no such checkpoint")
    provenance = _provenance(run)
    return {
        "run": str(run),
        "checkpoint": checkpoint.name if checkpoint else None,
        "iteration": checkpoint_step(checkpoint) if checkpoint else 0,
        "commit": provenance.get("commit"),
        "config_hash": provenance.get("config_hash"),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _provenance(run: Path) -> dict[str, Any]:
    path = run / "provenance.json"
    return read_record(path, AnyObject, remedy="repair it, or choose another --run") if path.exists() else {}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict | None) else None


def _link(source: str, target: str) -> str:
    """Hard-link a file that is never changed in place; copy it where links cannot be made."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
