"""Fits the progress model to labelled trajectories and reports its quality on held-out start states."""

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch.nn import functional as F

from reachrl.config.reward import RewardModelSection
from reachrl.errors import ConfigError, DivergedError, StorageError
from reachrl.rewards.process.label import class_weights, label_trajectory
from reachrl.rewards.process.model import ProgressModel
from reachrl.rewards.process.quality import ScoredTrajectory, binary_cross_entropy, measure
from reachrl.streams import Stream, generator
from reachrl.types import Start, Trajectory

log = logging.getLogger(__name__)

Labels = Sequence[Float32[np.ndarray, "T+1"]]
OnStep = Callable[[int, dict[str, float]], None]
_PROBE_FRAMES = 512  # held-out frames whose loss is reported while fitting


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """A fitted model, where it lies, and the content of `quality.json`."""

    model: ProgressModel
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
) -> FitResult:
    """Label trajectories, fit the progress model and measure it on start states it never saw.

    Writes `folder/model/` and, last, `folder/quality.json`: its presence means the fit is complete. A fit of
    the same data, options and seed that is already complete is read back instead of repeated.

    Args:
        trajectories: successes (demonstrations, rollouts) and failures, all from training start states.
        config: labels, model and optimisation.
        seed: of the split, the initial weights and the batches; torch's global generator is left alone.
        folder: where the results go.
        on_step: called with (step, {"train_loss", "heldout_loss"}) now and then.

    Raises:
        ConfigError: no trajectories, no successful one, or one from an evaluation start state.
        ExtensionError: an end-effector pose is not finite.
        DivergedError: the loss is not finite.
        StorageError: the results cannot be written.
    """
    data = list(trajectories)
    _check(data)
    fingerprint = _fingerprint(data, config, seed)
    finished = _read_finished(folder, fingerprint)
    if finished is not None:
        return finished
    labels = [label_trajectory(trajectory, config) for trajectory in data]
    heldout = split_starts(data, config.heldout_fraction, seed)
    fit_rows = [i for i, trajectory in enumerate(data) if trajectory.start not in heldout]
    test_rows = [i for i, trajectory in enumerate(data) if trajectory.start in heldout]
    model = _optimise(data, labels, fit_rows, test_rows, config, seed, on_step)

    fitted, tested = (_score_all(model, data, labels, rows) for rows in (fit_rows, test_rows))
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
    _write_json(folder / "quality.json", quality)
    return FitResult(model=model, folder=folder, quality=quality, skipped=False)


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
    heldout: set[Start] = set()
    for _, starts in sorted(strata.items()):
        count = min(max(1, round(fraction * len(starts))), len(starts) - 1)
        heldout.update(starts[i] for i in draw.permutation(len(starts))[:count])
    return frozenset(heldout)


def _check(data: Sequence[Trajectory]) -> None:
    """Refuse data that cannot teach progress, and say what would."""
    if not data:
        raise ConfigError("The reward model was given no trajectories. Run the `demos` stage first.")
    successes = sum(trajectory.success for trajectory in data)
    if successes == 0:
        raise ConfigError(
            f"None of the {len(data)} trajectories succeeded, so nothing shows what progress looks like. Collect "
            "demonstrations (the `demos` stage), or rollouts of a policy that sometimes succeeds."
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


def _optimise(
    data: Sequence[Trajectory],
    labels: Labels,
    fit_rows: Sequence[int],
    test_rows: Sequence[int],
    config: RewardModelSection,
    seed: int,
    on_step: OnStep | None,
) -> ProgressModel:
    """Minimise the cross-entropy for a fixed number of steps; nothing is chosen on the held-out side."""
    probe = _frames(labels, test_rows)
    probe = probe[generator(seed, Stream.REWARD_PROBE).permutation(len(probe))[:_PROBE_FRAMES]]
    positive, negative = 1.0, 1.0
    if config.balance:
        positive, negative = class_weights(np.concatenate([labels[row] for row in fit_rows]))
    shift = math.log(positive / negative)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ProgressModel(
            image_size=config.image_size,
            channels=config.channels,
            hidden=config.hidden,
            instructions=[trajectory.instruction for trajectory in data],
        )
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, config.steps))
    batches = _batches(data, labels, fit_rows, config, generator(seed, Stream.REWARD_BATCHES))
    losses: list[float] = []
    model.train()
    for step, (images, instructions, target) in enumerate(itertools.islice(batches, config.steps), start=1):
        logits = model(torch.from_numpy(images), model.encode_instructions(instructions))
        loss = -(positive * target * F.logsigmoid(logits) + negative * (1 - target) * F.logsigmoid(-logits)).mean()
        losses.append(F.binary_cross_entropy_with_logits(logits.detach() - shift, target).item())
        if not math.isfinite(losses[-1]):
            raise DivergedError(
                f"The reward model's loss is {losses[-1]} at step {step}. Nothing was saved; lower `reward_model.lr` "
                f"(now {config.lr})."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None and (step % config.log_every == 0 or step == config.steps):
            metrics = {"train_loss": float(np.mean(losses[-config.log_every :]))}
            if len(probe):
                metrics["heldout_loss"] = _probe_loss(model, data, labels, probe, shift=shift)
            on_step(step, metrics)
    with torch.no_grad():  # undo the weights' shift of the prior: scores are probabilities under the data
        model.head.bias.sub_(shift)
    return model.eval()


def _frames(labels: Labels, rows: Sequence[int]) -> Int64[np.ndarray, "F 2"]:
    """(trajectory, frame) of every frame of the chosen trajectories."""
    pairs = [(row, t) for row in rows for t in range(len(labels[row]))]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _batches(
    data: Sequence[Trajectory],
    labels: Labels,
    rows: Sequence[int],
    config: RewardModelSection,
    generator: np.random.Generator,
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], list[str], torch.Tensor]]:
    """Endless shuffled passes over the frames of `rows`: shifted frames, instructions, labels f32[B]."""
    frames = _frames(labels, rows)
    batch_size = min(config.batch_size, len(frames))
    while True:
        order = generator.permutation(len(frames))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = frames[order[start : start + batch_size]].tolist()
            images = random_shift(np.stack([data[row].images[t] for row, t in batch]), config.shift_pixels, generator)
            target = torch.tensor([float(labels[row][t]) for row, t in batch])
            yield images, [data[row].instruction for row, _ in batch], target


def random_shift(
    images: UInt8[np.ndarray, "B H W 3"], pixels: int, generator: np.random.Generator
) -> UInt8[np.ndarray, "B H W 3"]:
    """Move each frame by up to `pixels` in both directions, repeating its edge."""
    if pixels == 0:
        return images
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    offsets = generator.integers(0, 2 * pixels + 1, size=(len(images), 2))
    return np.stack(
        [frame[y : y + height, x : x + width] for frame, (y, x) in zip(padded, offsets.tolist(), strict=True)]
    )


def _optimizer(model: ProgressModel, config: RewardModelSection) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr)


def _lr_factor(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _probe_loss(
    model: ProgressModel,
    data: Sequence[Trajectory],
    labels: Labels,
    probe: np.ndarray,
    *,
    shift: float,
) -> float:
    """Unweighted cross-entropy of held-out frames, with the prior corrected by `shift` logits."""
    model.eval()
    scores = model.score(np.stack([data[r].images[t] for r, t in probe]), [data[r].instruction for r, _ in probe])
    model.train()
    scores = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    corrected = 1.0 / (1.0 + np.exp(shift - np.log(scores / (1.0 - scores))))
    return binary_cross_entropy(corrected, np.array([labels[r][t] for r, t in probe]))


def _score_all(
    model: ProgressModel,
    data: Sequence[Trajectory],
    labels: Labels,
    rows: Sequence[int],
) -> list[ScoredTrajectory]:
    """Score whole trajectories, about a thousand frames at a time."""
    scored: list[ScoredTrajectory] = []
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        images = np.concatenate([data[row].images for row in part])
        instructions = [data[row].instruction for row in part for _ in range(len(labels[row]))]
        scores = np.split(model.score(images, instructions), np.cumsum([len(labels[row]) for row in part])[:-1])
        scored += [
            ScoredTrajectory(task=data[r].start.task, success=data[r].success, scores=s, labels=labels[r])
            for r, s in zip(part, scores, strict=True)
        ]
    return scored


def _fingerprint(data: Sequence[Trajectory], config: RewardModelSection, seed: int) -> str:
    """Identifies the fit's inputs: options, seed, and each trajectory's start, outcome, actions and poses."""
    digest = hashlib.sha256(f"{config.model_dump_json()} {seed}".encode())
    for trajectory in data:
        digest.update(f"{trajectory.start} {trajectory.instruction} {trajectory.success}".encode())
        digest.update(trajectory.actions.tobytes())
        digest.update(trajectory.ee_state.tobytes())
        digest.update(trajectory.images[-1].tobytes())
    return digest.hexdigest()


def _read_finished(folder: Path, fingerprint: str) -> FitResult | None:
    """The result of a complete fit of the same inputs, or None."""
    path = folder / "quality.json"
    if not path.exists():
        return None
    try:
        quality = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        log.warning("%s is unreadable (%s): fitting the reward model again.", path, error)
        return None
    if quality.get("fingerprint") != fingerprint:
        log.info("The reward model in %s was fitted to other data or options: fitting again.", folder)
        return None
    model = ProgressModel.from_pretrained(folder / "model")
    return FitResult(model=model, folder=folder, quality=quality, skipped=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        os.replace(aside, path)
    except OSError as error:
        raise StorageError(
            f"Cannot write {path}: {error}. Free space or fix rights, then run the stage again."
        ) from error
