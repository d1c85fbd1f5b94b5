"""Fits a reward model to labelled trajectories and reports its quality on held-out start states."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reachrl.config.reward_model import RewardModelSection
from reachrl.errors import ConfigError, StorageError
from reachrl.fitting import hold_out
from reachrl.registry import resolve
from reachrl.rewards.process.base import RewardModel, clip_frames, load_reward_model
from reachrl.rewards.process.label import label_trajectory
from reachrl.rewards.process.optimise import Labels, OnStep, optimise
from reachrl.rewards.process.quality import ScoredTrajectory, measure
from reachrl.run.atomic import write_json_atomic
from reachrl.run.records import RewardQuality, read_record
from reachrl.streams import Stream, generator
from reachrl.types import Start, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """A fitted model, where it lies, and the content of `quality.json`."""

    model: RewardModel
    folder: Path
    quality: dict[str, Any]
    skipped: bool  # an earlier, finished fit of the same data, options and seed was read instead


def fit_reward_model(
    trajectories: Iterable[Trajectory],
    config: RewardModelSection,
    *,
    seed: int,
    folder: Path,
    on_step: OnStep | None = None,
    device: torch.device | str = "cpu",
    start_from: RewardModel | None = None,
) -> FitResult:
    """Label trajectories, fit a reward model and measure it on start states it never saw.

    Writes `folder/model/` and, last, `folder/quality.json`: its presence means the fit is complete. A fit of
    the same data, options and seed that is already complete is read back instead of repeated.

    Args:
        trajectories: successes (demonstrations, rollouts) and failures, all from training start states.
        config: labels, model and optimisation.
        seed: of the split, the initial weights and the batches; torch's global generator is left alone.
        folder: where the results go.
        on_step: called with (step, {"train_loss", "heldout_loss"}) now and then.
        device: where it is fitted.
        start_from: a refit: this model, for `refit_steps`, instead of new weights for `steps`; changed in place.

    Raises:
        ConfigError: no trajectories, no successful one, or one from an evaluation start state.
        ExtensionError: an end-effector pose is not finite.
        DivergedError: the loss is not finite.
        StorageError: the results cannot be written.
    """
    data = list(trajectories)
    _check(data)
    steps = config.steps if start_from is None else config.refit_steps
    fingerprint = _fingerprint(data, config, seed, steps)
    finished = _read_finished(folder, fingerprint)
    if finished is not None:
        return finished
    labels = [label_trajectory(trajectory, config) for trajectory in data]
    heldout = split_starts(data, config.heldout_fraction, seed)
    fit_rows = [i for i, trajectory in enumerate(data) if trajectory.start not in heldout]
    test_rows = [i for i, trajectory in enumerate(data) if trajectory.start in heldout]
    model = start_from or new_reward_model(config, [trajectory.instruction for trajectory in data], seed=seed)
    model = optimise(
        model.to(device),
        data,
        labels,
        fit_rows=fit_rows,
        test_rows=test_rows,
        config=config,
        steps=steps,
        seed=seed,
        fitted=start_from is not None,
        on_step=on_step,
    )
    fitted, tested = (
        score_trajectories(model, [data[row] for row in rows], [labels[row] for row in rows])
        for rows in (fit_rows, test_rows)
    )
    quality: dict[str, Any] = {
        "fingerprint": fingerprint,
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fit": measure(fitted),
        "heldout": measure(tested),
        "per_task": {
            task: measure([item for item in tested if item.task == task])
            for task in sorted({trajectory.start.task for trajectory in data})
        },
    }
    model.save_pretrained(folder / "model")
    write_json_atomic(folder / "quality.json", quality)
    return FitResult(model=model, folder=folder, quality=quality, skipped=False)


def new_reward_model(config: RewardModelSection, instructions: Sequence[str], *, seed: int) -> RewardModel:
    """A model of the configured kind with the seed's initial weights; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return resolve("reward_models", config.kind).for_fit(config, instructions)


def split_starts(trajectories: Sequence[Trajectory], fraction: float, seed: int) -> frozenset[Start]:
    """Choose the start states whose trajectories are held out of the fit.

    All trajectories of one start go to the same side. Within each task, starts that saw a failure and
    starts that did not give the same share, at least one where there are two, so that both outcomes are
    held out whenever the data allow it.

    Args:
        trajectories: the whole data set.
        fraction: share of starts to hold out.
        seed: of the choice; the order of `trajectories` does not matter.
    """
    failed = {trajectory.start for trajectory in trajectories if not trajectory.success}
    strata: dict[tuple[str, bool], list[Start]] = {}
    for start in sorted({trajectory.start for trajectory in trajectories}):
        strata.setdefault((start.task, start in failed), []).append(start)
    draw = generator(seed, Stream.REWARD_SPLIT)
    return frozenset(hold_out(((starts, draw) for _, starts in sorted(strata.items())), fraction))


def _check(data: Sequence[Trajectory]) -> None:
    """Check that the data can teach progress: successes, training starts, frames of one size."""
    if not data:
        raise ConfigError("The reward model was given no trajectories. Run the `demos` stage first.")
    successes = sum(trajectory.success for trajectory in data)
    if successes == 0:
        raise ConfigError(
            f"None of the {len(data)} trajectories succeeded, so nothing shows what progress looks like. Collect "
            "demonstrations (the `demos` stage), or rollouts of a policy that sometimes succeeds."
        )
    sizes = sorted({trajectory.frames.shape[1:3] for trajectory in data})
    if len(sizes) > 1:
        raise ConfigError(
            f"The trajectories' frames have several sizes, {', '.join(f'{h}x{w}' for h, w in sizes)} pixels; a reward "
            "model is fitted to frames of one size. Leave the others out, or collect them at this run's env.image_size."
        )
    for trajectory in data:
        if trajectory.start.split != "train":
            raise ConfigError(
                f"A trajectory of task '{trajectory.start.task}' begins at {trajectory.start.split} start "
                f"{trajectory.start.index}. The reward model learns from `train` starts only: collect it again there."
            )
    if successes == len(data):
        log.warning(
            "All %d trajectories succeeded: without failures the reward model cannot learn to tell them apart. "
            "Raise `reward_model.rollouts_per_task`.",
            len(data),
        )


def score_trajectories(
    model: RewardModel, data: Sequence[Trajectory], labels: Labels, *, batch_size: int = 128
) -> list[ScoredTrajectory]:
    """Score every frame of whole trajectories, about a thousand frames at a time.

    Args:
        model: a fitted model.
        data: trajectories.
        labels: the targets of their frames.
        batch_size: clips a forward pass.
    """
    scored: list[ScoredTrajectory] = []
    for start in range(0, len(data), 32):
        part = data[start : start + 32]
        lengths = [len(trajectory.frames) for trajectory in part]
        shape = {"num_frames": model.num_frames, "frame_stride": model.frame_stride}
        clips = np.concatenate([each.frames[clip_frames(np.arange(len(each.frames)), **shape)] for each in part])
        instructions = [each.instruction for each, length in zip(part, lengths, strict=True) for _ in range(length)]
        scores = np.split(model.score(clips, instructions, batch_size=batch_size), np.cumsum(lengths)[:-1])
        scored += [
            ScoredTrajectory(task=each.start.task, success=each.success, scores=found, labels=target)
            for each, found, target in zip(part, scores, labels[start : start + 32], strict=True)
        ]
    return scored


def _fingerprint(data: Sequence[Trajectory], config: RewardModelSection, seed: int, steps: int) -> str:
    """Identifies the fit's inputs: options, seed, and each trajectory's start, outcome, actions and poses."""
    digest = hashlib.sha256(f"{config.model_dump_json()} {seed} {steps}".encode())
    for trajectory in data:
        digest.update(f"{trajectory.start} {trajectory.instruction} {trajectory.success}".encode())
        digest.update(trajectory.actions.tobytes())
        digest.update(trajectory.ee_state.tobytes())
        digest.update(trajectory.frames[-1].tobytes())
    return digest.hexdigest()


def _read_finished(folder: Path, fingerprint: str) -> FitResult | None:
    """The result of a complete fit of the same inputs, or None."""
    path = folder / "quality.json"
    if not path.exists():
        return None
    try:
        quality = read_record(path, RewardQuality, remedy="it is written again")
    except StorageError as error:
        log.warning("%s is unreadable (%s): fitting the reward model again.", path, error)
        return None
    if quality.get("fingerprint") != fingerprint:
        log.info("The reward model in %s was fitted to other data or options: fitting again.", folder)
        return None
    model = load_reward_model(folder / "model")
    return FitResult(model=model, folder=folder, quality=quality, skipped=True)
