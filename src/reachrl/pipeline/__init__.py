"""The pipeline: stages demos, sft, reward, train, eval and report, which share one run folder."""

import importlib
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reachrl import torchrun
from reachrl.config.loading import config_dict, config_hash, is_default
from reachrl.config.named_code import names
from reachrl.config.train import TrainConfig, refuse_training
from reachrl.errors import ConfigError
from reachrl.pipeline.base import Display

if TYPE_CHECKING:
    from reachrl.loop import Callback
    from reachrl.run.directory import Run

# In order; each needs the one before. The values name the function that runs it.
_RUNNERS = {
    "demos": "reachrl.pipeline.warm_start:run_demos",
    "sft": "reachrl.pipeline.warm_start:run_sft",
    "reward": "reachrl.pipeline.rl_stages:run_reward",
    "train": "reachrl.pipeline.rl_stages:run_train",
    "eval": "reachrl.pipeline.evaluation:run_eval",
    "report": "reachrl.pipeline.evaluation:run_report",
}
STAGES: tuple[str, ...] = tuple(_RUNNERS)
_TRAINING = ("demos", "sft", "reward", "train")  # what leads up to trained weights


def run_stage(
    name: str, config: TrainConfig, run_dir: Path, display: Display, callbacks: "Sequence[Callback]" = ()
) -> dict[str, Any]:
    """Run one stage in a run folder, or skip it if it is finished there; a killed stage continues.

    Args:
        name: one of `STAGES`.
        config: the resolved configuration; in an existing folder only what is permitted may differ, and is recorded.
        run_dir: the run folder.
        display: where progress goes.
        callbacks: called after every iteration of the stage `train`; may end it.

    Returns:
        The stage's record in `stages.json`.

    Raises:
        ConfigError: a configuration that the folder's does not permit, an earlier stage has not run, or `torchrun`
            around another stage than `train`.
        StopTraining: a callback ended the stage `train`, which goes on from its checkpoint when it is run again.
        ReachRLError: whatever the stage itself raises.
    """
    if config.num_threads is not None and not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(config.num_threads)  # read when OpenMP's runtime is loaded, with PyTorch
    from reachrl.backends.policy_loading import limit_threads
    from reachrl.evaluation import protocol_hash
    from reachrl.pipeline.resumption import permit
    from reachrl.run.directory import Run
    from reachrl.run.provenance import write_provenance

    if name in _TRAINING:
        refuse_training(config)
    limit_threads(config)
    rank, size = torchrun.rank(), torchrun.size()
    if size > 1:
        _refuse_ranks(name, config)
    if rank > 0:
        from reachrl.backends.local import LocalBackend

        LocalBackend(config.backend).follow(config)
        return {}
    if not (run_dir / "config.json").exists() and (earlier := _before(name, _missing(config, {}))):
        raise ConfigError(
            f"{run_dir}: there is no run for {name!r}: give its folder, or begin with `reachrl {earlier}`"
        )
    known = partial(is_default, config)
    with Run.open(run_dir, config_dict(config), permit=permit(config), is_default=known) as run:
        records = {each: run.stages.done(each) for each in STAGES}
        finished, missing = records[name], _missing(config, records)
        write_provenance(
            run.provenance,
            stage=None if finished is not None and name not in missing else name,
            seed=config.seed,
            protocol_hash=protocol_hash(config),
            config_hash=config_hash(config),
            plugins=dict(names(config_dict(config))),
        )
        # The report is redrawn from what lies on disk.
        if finished is not None and name != "report" and name not in missing:
            display.log(f"{name}: already done in {run_dir}")
            if size > 1:
                from reachrl.backends.group import Group

                Group.from_environment().dismiss()
            return finished
        earlier = _before(name, missing)
        if earlier is not None and name == "report":
            return _interim_report(config, run, missing, display)
        if earlier is not None:
            raise ConfigError(_needs(name, earlier, config, run))
        module, _, function = _RUNNERS[name].partition(":")
        runner = getattr(importlib.import_module(module), function)
        with run.stages.measure(name) as clock:
            heard = {"callbacks": callbacks} if name == "train" else {}
            clock.info.update(runner(config, run, display, **heard) or {})
        if name == "report":
            # Once more, now that its own seconds are known: the summary must add up.
            runner(config, run, display)
        record = run.stages.done(name)
        assert record is not None
        return record


def _refuse_ranks(name: str, config: TrainConfig) -> None:
    """Raise a `ConfigError` where the processes of `torchrun` have no part in a stage."""
    if name != "train":
        raise ConfigError(f"torchrun is for `reachrl train`; run the stage {name!r} in one process, without it")
    if config.backend.kind != "local":
        raise ConfigError(
            f"torchrun is for backend.kind=local; backend.kind={config.backend.kind} starts its own processes: run "
            "`reachrl train` without torchrun"
        )


def _before(name: str, missing: Collection[str]) -> str | None:
    """The first of the missing stages that has to finish before this one, if any."""
    return next((each for each in STAGES[: STAGES.index(name)] if each in missing), None)


def _missing(config: TrainConfig, records: Mapping[str, dict[str, Any] | None]) -> set[str]:
    """Stages that have not finished, without those that have nothing to do under this configuration."""
    from reachrl.pipeline.resumption import made_nothing
    from reachrl.pipeline.warm_start import needs_demos

    idle = {"demos": not needs_demos(config), "reward": not config.fits_reward_model}
    return {
        name
        for name in STAGES
        if not idle.get(name, False)
        and ((record := records.get(name)) is None or (name in idle and made_nothing(record)))
    }


def _needs(name: str, earlier: str, config: TrainConfig, run: "Run") -> str:
    """The error message for a stage whose predecessor has not finished."""
    command = "reward fit" if earlier == "reward" else earlier
    text = (
        f"{run.path}: stage {name!r} needs {earlier!r}, which has not finished there. Run `reachrl {command}` with the "
        "same preset and --run first."
    )
    done = trained_iterations(run.path)
    if earlier == "train" and done:
        text += (
            f" {done} of {config.num_iterations} iterations are done: `reachrl train --run {run.path} --until {done}` "
            "ends it there"
        )
        text += ", and `reachrl eval --checkpoint latest` measures what there is." if name == "eval" else "."
    return text


def trained_iterations(path: Path) -> int:
    """Training iterations in a run's last checkpoint; 0 without one."""
    from reachrl.run.checkpoint import checkpoint_step, latest_checkpoint

    latest = latest_checkpoint(path / "checkpoints")
    return 0 if latest is None else checkpoint_step(latest)


def _interim_report(config: TrainConfig, run: "Run", missing: set[str], display: Display) -> dict[str, Any]:
    """Draw what an unfinished run has so far; the stage stays unfinished."""
    from reachrl.report.report import write_report

    write_report(run.path)
    if "train" in missing:
        done = f"training has done {trained_iterations(run.path)} of {config.num_iterations} iterations"
    else:
        done = f"all {config.num_iterations} iterations are trained"
        if "eval" in missing:
            done += f", not yet evaluated: `reachrl eval --run {run.path}` does it"
    display.log(f"{run.path} is unfinished: {done}")
    return {}
