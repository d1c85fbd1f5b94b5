"""The functions `reachrl.train` and `reachrl.evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from reachrl.cli.display import Display
from reachrl.cli.terminal import Terminal
from reachrl.config.evaluation import mode_temperature
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError, StopTraining
from reachrl.pipeline import STAGES, run_stage, trained_iterations
from reachrl.results import EvaluationResult, TrainResult
from reachrl.run.checkpoint import latest_checkpoint
from reachrl.run.metrics import read_metrics

if TYPE_CHECKING:
    from reachrl.loop import Callback
    from reachrl.policies.base import Policy


def train(
    config: TrainConfig, run: Path | str, *, callbacks: "Sequence[Callback]" = (), quiet: bool = False
) -> TrainResult:
    """Run the whole story in a run folder: demonstrations, warm start, reward model, training, evaluation, report.

    What is finished there is skipped and what was interrupted goes on, so calling it again is always safe.

    Args:
        config: from `reachrl.load_config`.
        run: the run folder; a new name begins a new run.
        callbacks: functions of one training iteration's record of metrics; one that returns True stops the run, with a
            checkpoint to go on from.
        quiet: print only warnings.

    Returns:
        Metrics, success before and after, the policy, the files.

    Raises:
        ConfigError: the folder belongs to another configuration, or is in use.
        ReachRLError: a stage failed; finished work is kept.
    """
    folder, display, stopped = Path(run), _display(quiet), False
    with display.logging():
        try:
            for name in STAGES:
                run_stage(name, config, folder, display, callbacks)
        except StopTraining as stop:
            stopped = True
            display.log(f"train: {stop}; call train again with the same folder to go on")
            run_stage("report", config, folder, display)
    return _result(config, folder, stopped=stopped)


def evaluate(
    policy: "Policy | Path | str", config: TrainConfig, *, mode: str | None = None, quiet: bool = False
) -> EvaluationResult:
    """Measure a policy's success on the held-out start states of `config.env` and `config.eval`.

    Equal policies get equal outcomes: starts and noise are numbered.

    Args:
        policy: a policy, or what `load_policy` takes.
        config: which tasks, how many starts; from `reachrl.load_config`.
        mode: `greedy`, `sampled` (temperature 1), `mean` or another temperature's name such as `sampled@0.6`; None: the
            first of `config.eval.temperatures`.
        quiet: print only warnings.

    Returns:
        Success of all tasks and of each, with intervals, and every episode.

    Raises:
        ConfigError: another mode, or a policy for another environment.
        ReachRLError: the policy cannot be loaded, or an environment keeps failing.
    """
    from reachrl.backends.policy_loading import limit_threads, load_policy
    from reachrl.evaluation import heldout_starts, protocol_hash
    from reachrl.pipeline.base import caveats
    from reachrl.pipeline.playing import play_modes
    from reachrl.policies.base import Policy

    mode = mode or config.eval.modes[0]
    try:
        mode_temperature(mode)
    except ValueError as error:
        raise ConfigError(f"mode={mode!r}: expected 'greedy', 'sampled', 'mean' or such as 'sampled@0.6'") from error
    limit_threads(config)
    acting = policy if isinstance(policy, Policy) else load_policy(policy, device=config.device)
    starts = heldout_starts(config.env, config.eval)
    display = _display(quiet)
    with display.logging():
        found = play_modes(config, acting, {mode: starts}, display, f"held-out starts, {mode}")[mode]
    return EvaluationResult.of(mode, found.record(), protocol_hash=protocol_hash(config), caveats=caveats(config))


def _display(quiet: bool) -> Display:
    """Bars on a terminal; in a notebook, which asks programs for colours, and in a log plain lines."""
    notebook = Console().is_jupyter
    return Display(Terminal(force_jupyter=False, force_terminal=False if notebook else None), quiet=quiet)


def _result(config: TrainConfig, folder: Path, *, stopped: bool) -> TrainResult:
    from reachrl.evaluation import protocol_hash
    from reachrl.pipeline.base import caveats

    def evaluations(when: str) -> dict[str, EvaluationResult]:
        file = folder / "eval" / f"{when}.json"
        if stopped or not file.is_file():
            return {}
        records = json.loads(file.read_text(encoding="utf-8"))
        facts = {"protocol_hash": protocol_hash(config), "caveats": caveats(config)}
        return {mode: EvaluationResult.of(mode, records[mode], **facts) for mode in config.eval.modes}

    latest = latest_checkpoint(folder / "checkpoints")
    return TrainResult(
        folder=folder,
        iterations=trained_iterations(folder),
        stopped=stopped,
        metrics=read_metrics(folder / "metrics.jsonl", "train"),
        before=evaluations("before"),
        after=evaluations("after"),
        best=evaluations("best"),
        policy_folder=latest / "policy" if stopped and latest is not None else folder / "policy",
        device=config.device,
    )
