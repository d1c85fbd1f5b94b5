"""Seconds of one iteration by part, by a roofline model of each operation."""

import math
from dataclasses import dataclass

from reachrl.config.algorithm import KL_ROWS, STOP_ROWS
from reachrl.config.train import TrainConfig
from reachrl.plan.device import Device
from reachrl.plan.layout import Layout, layout_of
from reachrl.plan.memory import micro_rows, trained
from reachrl.plan.outline import Outline, algorithm_of, outline_of
from reachrl.plan.passes import Pass

# Decisions per second of Meta-World's simulators alone on two cores: 272, 363 and 455 were measured
# (docs/benchmarks/rendering.md, "One decision" and below). It must be measured on other machines.
DECISIONS_PER_SECOND = 360.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """One entry of a time plan."""

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0  # read and written


@dataclass(frozen=True, slots=True)
class TimePlan:
    """The parts of an iteration, in sequence."""

    stretches: tuple[Stretch, ...]

    @property
    def seconds(self) -> float:
        """Seconds of one iteration."""
        return sum(stretch.seconds for stretch in self.stretches)


def plan_time(config: TrainConfig, device: Device, decisions_per_second: float = DECISIONS_PER_SECOND) -> TimePlan:
    """Predict one iteration that finishes all epochs and trains policy and critic.

    Encoding frames, the process reward, advantages and checkpoints are neglected. Communication between processes,
    waiting for the slowest and overlapping work are not modelled.

    Args:
        config: the run; with several processes, one learner's and one actor's share is counted.
        device: of each process.
        decisions_per_second: of all simulators together, without the policy.

    Raises:
        ConfigError: the algorithm is a plug-in, or the policy does not run on the meta device.
    """
    layout, outline = layout_of(config), outline_of(config, accelerator=not device.is_cpu)
    simulators = Stretch(name="environment steps", seconds=layout.decisions / decisions_per_second)
    calls = config.rollout.num_steps * layout.groups
    acting = _stretch("acting", device, (outline.acting, calls, calls * layout.decoded_rows))
    learning = _scoring(config, device, outline, layout), _update(config, device, outline, layout)
    return TimePlan((simulators, acting, *learning, _kl(config, device, outline, layout)))


def _stretch(name: str, device: Device, *passes: tuple[Pass, float, float], training: bool = False) -> Stretch:
    """Return one entry for consecutive passes, each given as (pass, number of passes, total rows)."""
    seconds = flops = moved = 0.0
    for each, times, rows in passes:
        if times:
            seconds += times * each.seconds(rows / times, device, training=training)
            flops += times * each.flops(rows / times)
            moved += times * each.moved(rows / times)
    return Stretch(name=name, seconds=seconds, flops=flops, bytes=moved)


def _scoring(config: TrainConfig, device: Device, outline: Outline, layout: Layout) -> Stretch:
    """Log-probs and values of a learner's decisions, and values of all final and last frames."""
    algorithm, rows = algorithm_of(config), layout.block
    batches = math.ceil(rows / algorithm.score_batch_size)
    passes = [(outline.scoring, batches, rows)]
    if not algorithm.train_vision:  # else its frames are part of it
        passes.append((outline.seeing, batches, rows))
    if algorithm.needs.values:
        last = layout.environments + layout.decisions / config.env.max_steps  # bootstraps, and episodes at their limit
        batches = math.ceil(last / algorithm.score_batch_size)
        passes += [(outline.seeing, batches, last), (outline.valuing, batches, last)]
    return _stretch("scoring", device, *passes)


def _kl(config: TrainConfig, device: Device, outline: Outline, layout: Layout) -> Stretch:
    """KL of the update: after the last step and, with `target_kl`, during the epochs."""
    algorithm, decisions = algorithm_of(config), layout.decisions
    rows, looks = min(KL_ROWS, decisions), 0
    if algorithm.target_kl is not None:
        looks = algorithm.epochs * math.ceil(decisions / max(STOP_ROWS, algorithm.minibatch_size)) - 1
    passes = math.ceil(rows / layout.learners / algorithm.score_batch_size) + looks
    rows = (rows + looks * min(STOP_ROWS, decisions)) / layout.learners
    return _stretch("KL of the update", device, (outline.scoring, passes, rows))


def _update(config: TrainConfig, device: Device, outline: Outline, layout: Layout) -> Stretch:
    algorithm = algorithm_of(config)
    rows = layout.decisions / layout.learners
    steps = algorithm.epochs * math.ceil(layout.decisions / algorithm.minibatch_size)
    minibatch = min(algorithm.minibatch_size, layout.decisions)
    passes = steps * math.ceil(minibatch / layout.learners / micro_rows(config))
    name = f"{config.algorithm.kind.upper()}, {algorithm.epochs} epochs"  # pyright: ignore[reportAttributeAccessIssue]
    learned = _stretch(name, device, (outline.training[0], passes, algorithm.epochs * rows), training=True)
    adamw = steps * 7 * trained(outline) / layout.pieces  # reads 4 and writes 3 numbers a parameter
    transfer = adamw / (device.bandwidth_share * 1e9 * device.bandwidth)
    return Stretch(name=name, seconds=learned.seconds + transfer, flops=learned.flops, bytes=learned.bytes + adamw)
