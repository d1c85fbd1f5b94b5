"""The story as stages that share one run folder: demos, sft, reward, train, eval, report."""

import importlib
import os
from pathlib import Path
from typing import Any

from reachrl import torchrun
from reachrl.config.loading import config_dict, config_hash
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.pipeline.base import Display

# In order; each needs the one before. The values name the function that runs it.
_RUNNERS = {
    "demos": "reachrl.pipeline.warm_start:run_demos",
    "sft": "reachrl.pipeline.warm_start:run_sft",
    "reward": "reachrl.pipeline.reinforce:run_reward",
    "train": "reachrl.pipeline.reinforce:run_train",
    "eval": "reachrl.pipeline.assess:run_eval",
    "report": "reachrl.pipeline.assess:run_report",
}
STAGES: tuple[str, ...] = tuple(_RUNNERS)


def run_stage(name: str, config: TrainConfig, run_dir: Path, display: Display) -> dict[str, Any]:
    """Run one stage in a run folder, or skip it if it is finished there; a killed stage continues.

    Args:
        name: one of `STAGES`.
        config: the resolved configuration; an existing folder must have been made with the same one.
        run_dir: the run folder.
        display: where progress goes.

    Returns:
        The stage's record in `stages.json`.

    Raises:
        ConfigError: another configuration's folder, an earlier stage has not run, or `torchrun` around another stage
            than `train`.
        ReachRLError: whatever the stage itself raises.
    """
    from reachrl.evaluate import protocol_hash
    from reachrl.run.directory import Run
    from reachrl.run.provenance import write_provenance

    _limit_threads(config)
    rank, size = torchrun.rank(), torchrun.size()
    if size > 1 and name != "train":
        raise ConfigError(f"torchrun is for `reachrl train`; run the stage {name!r} in one process, without it")
    if size > 1 and config.backend.kind != "local":
        raise ConfigError(
            f"torchrun is for backend.kind=local; backend.kind={config.backend.kind} starts its own processes: run "
            "`reachrl train` without torchrun"
        )
    if rank > 0:
        from reachrl.pipeline.reinforce import follow_train

        follow_train(config)
        return {}
    with Run.open(run_dir, config_dict(config), config_hash=config_hash(config)) as run:
        write_provenance(
            run.provenance, seed=config.seed, protocol_hash=protocol_hash(config), config_hash=config_hash(config)
        )
        finished = run.stage_done(name)
        if finished is not None and name != "report":  # the report is redrawn from what lies on disk
            display.log(f"{name}: already done in {run_dir}")
            if size > 1:
                from reachrl.backends.data_parallel import dismiss

                dismiss()
            return finished
        for earlier in STAGES[: STAGES.index(name)]:
            if run.stage_done(earlier) is None:
                raise ConfigError(
                    f"{run_dir}: stage {name!r} needs {earlier!r}, which has not finished there. Run `reachrl "
                    f"{'reward fit' if earlier == 'reward' else earlier}` with the same preset and --run first."
                )
        module, _, function = _RUNNERS[name].partition(":")
        runner = getattr(importlib.import_module(module), function)
        with run.stage(name) as clock:
            clock.info.update(runner(config, run, display) or {})
        if name == "report":
            # Once more, now that its own seconds are known: the summary must add up.
            runner(config, run, display)
        record = run.stage_done(name)
        assert record is not None
        return record


def _limit_threads(config: TrainConfig) -> None:
    if config.num_threads is not None:
        if not os.environ.get("OMP_NUM_THREADS"):
            os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
        import torch

        torch.set_num_threads(config.num_threads)
