"""The optimisation of a reward model: labelled clips in, minimised cross-entropy out."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch.nn import functional as F

from reachrl.config.reward_model import RewardModelSection
from reachrl.errors import DivergedError
from reachrl.fitting import adamw, scheduled, shifted
from reachrl.rewards.process.base import RewardModel, clip_frames
from reachrl.rewards.process.label import class_weights
from reachrl.rewards.process.quality import binary_cross_entropy
from reachrl.streams import Stream, generator
from reachrl.types import Trajectory

Labels = Sequence[Float32[np.ndarray, "T+1"]]
OnStep = Callable[[int, dict[str, float]], None]
_PROBE_FRAMES = 512  # held-out frames whose loss is reported while fitting


def optimise(
    model: RewardModel,
    data: Sequence[Trajectory],
    labels: Labels,
    *,
    fit_rows: Sequence[int],
    test_rows: Sequence[int],
    config: RewardModelSection,
    steps: int,
    seed: int,
    fitted: bool = False,
    on_step: OnStep | None = None,
) -> RewardModel:
    """Minimise the cross-entropy for a fixed number of steps; nothing is chosen on the held-out side.

    Args:
        model: what is trained, in place.
        data: trajectories.
        labels: a target in [0, 1] for each of their frames; NaN where a frame takes no part.
        fit_rows: the trajectories to learn from.
        test_rows: those whose loss is reported.
        config: the optimisation's options.
        steps: optimiser steps.
        seed: of the batches.
        fitted: whether the model's answers are probabilities already, from an earlier fit.
        on_step: called with (step, {"train_loss", "heldout_loss"}) now and then.

    Raises:
        DivergedError: the loss is not finite.
    """
    if steps == 0:
        return model.eval()
    probe = _labelled_frames(labels, test_rows)
    probe = probe[generator(seed, Stream.REWARD_PROBE).permutation(len(probe))[:_PROBE_FRAMES]]
    positive, negative = 1.0, 1.0
    if config.balance:
        found = np.concatenate([labels[row] for row in fit_rows])
        positive, negative = class_weights(found[np.isfinite(found)])
    shift = math.log(positive / negative)
    if fitted:  # back to the prior that the weights of the loss pull towards
        model.shift_logits(shift)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trained, lr=config.lr, weight_decay=config.weight_decay, model=type(model).__name__)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scheduled(1.0, step, warmup=warmup, end=steps))
    batches = _batches(model, data, labels, fit_rows, config, seed)
    losses: list[float] = []
    model.train()
    for step, (clips, instructions, target) in enumerate(itertools.islice(batches, steps), start=1):
        logits = model.logits(clips, instructions)
        target = target.to(logits.device)
        loss = -(positive * target * F.logsigmoid(logits) + negative * (1 - target) * F.logsigmoid(-logits)).mean()
        losses.append(F.binary_cross_entropy_with_logits(logits.detach() - shift, target).item())
        if not math.isfinite(losses[-1]):
            raise DivergedError(
                f"The reward model's loss is {losses[-1]} at step {step}. Nothing was saved; lower `reward_model.lr` "
                f"(now {config.lr})."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None and (step % config.log_every == 0 or step == steps):
            metrics = {"train_loss": float(np.mean(losses[-config.log_every :]))}
            if len(probe):
                metrics["heldout_loss"] = _probe_loss(model, data, labels, probe, config=config, shift=shift)
            on_step(step, metrics)
    model.shift_logits(-shift)  # undo the weights' shift of the prior: scores are probabilities under the data
    return model.eval()


def clip(trajectory: Trajectory, frame: int, model: RewardModel) -> UInt8[np.ndarray, "F H W 3"]:
    """The clip of `model` that ends at one frame of a trajectory."""
    return trajectory.frames[_clip_frames(frame, model)]


def _clip_frames(frame: int, model: RewardModel) -> Int64[np.ndarray, "F"]:
    return clip_frames(np.array([frame]), num_frames=model.num_frames, frame_stride=model.frame_stride)[0]


def _labelled_frames(labels: Labels, rows: Sequence[int]) -> Int64[np.ndarray, "K 2"]:
    """(trajectory, frame) of every frame of the chosen trajectories that has a label."""
    pairs = [(row, t) for row in rows for t in np.flatnonzero(np.isfinite(labels[row])).tolist()]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _batches(
    model: RewardModel,
    data: Sequence[Trajectory],
    labels: Labels,
    rows: Sequence[int],
    config: RewardModelSection,
    seed: int,
) -> Iterator[tuple[UInt8[np.ndarray, "B F H W 3"], list[str], torch.Tensor]]:
    """Endless shuffled passes over the labelled frames of `rows`: shifted clips, instructions, labels f32[B]."""
    draw, shuffle = generator(seed, Stream.REWARD_BATCHES), generator(seed, Stream.REWARD_SHUFFLE)
    frames = _labelled_frames(labels, rows)
    batch_size = min(config.batch_size, len(frames))
    successes = [row for row in rows if data[row].success and len(data[row].frames) > model.frame_stride]
    num_shuffled = round(config.shuffled_negatives * batch_size) if successes else 0
    while True:
        order = draw.permutation(len(frames))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = frames[order[start : start + batch_size]].tolist()
            clips = np.stack([clip(data[row], t, model) for row, t in batch])
            instructions = [data[row].instruction for row, _ in batch]
            target = torch.tensor([float(labels[row][t]) for row, t in batch])
            for i in range(num_shuffled):  # the batch is in random order already
                trajectory = data[successes[shuffle.integers(len(successes))]]
                clips[i] = shuffled_clip(trajectory, model, shuffle)
                instructions[i], target[i] = trajectory.instruction, 0.0
            yield random_shift(clips, config.shift_pixels, draw), instructions, target


def shuffled_clip(
    trajectory: Trajectory, model: RewardModel, draw: np.random.Generator
) -> UInt8[np.ndarray, "F H W 3"]:
    """A clip of a trajectory with its frames in an order in which they never were.

    Args:
        trajectory: of more than `frame_stride` frames.
        model: says how clips are cut; of at least two frames.
        draw: where the clip and the order come from.
    """
    last = int(draw.integers(model.frame_stride, len(trajectory.frames)))
    right = _clip_frames(last, model)
    wrong = right
    while np.array_equal(wrong, right):  # at least two of the frames differ
        wrong = draw.permutation(right)
    return trajectory.frames[wrong]


def random_shift(
    clips: UInt8[np.ndarray, "B F H W 3"], pixels: int, generator: np.random.Generator
) -> UInt8[np.ndarray, "B F H W 3"]:
    """Move each clip by up to `pixels` in both directions, repeating the edges of its frames."""
    if pixels == 0:
        return clips
    return shifted(clips, pixels - generator.integers(0, 2 * pixels + 1, size=(len(clips), 2)))


def _probe_loss(
    model: RewardModel,
    data: Sequence[Trajectory],
    labels: Labels,
    probe: np.ndarray,
    *,
    config: RewardModelSection,
    shift: float,
) -> float:
    """Unweighted cross-entropy of held-out frames, with the prior corrected by `shift` logits."""
    model.eval()
    clips = np.stack([clip(data[row], t, model) for row, t in probe])
    scores = model.score(clips, [data[row].instruction for row, _ in probe], batch_size=2 * config.batch_size)
    model.train()
    scores = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    corrected = 1.0 / (1.0 + np.exp(shift - np.log(scores / (1.0 - scores))))
    return binary_cross_entropy(corrected, np.array([labels[row][t] for row, t in probe]))
