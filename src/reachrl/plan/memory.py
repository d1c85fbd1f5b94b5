"""Peak memory of a device by part: what is always allocated, plus the largest phase of an iteration."""

from dataclasses import dataclass, replace
from typing import Literal

from reachrl.config.policy import check_float8
from reachrl.config.train import TrainConfig
from reachrl.plan.device import GIB, Device
from reachrl.plan.layout import Layout, layout_of
from reachrl.plan.outline import Outline, algorithm_of, cameras, outline_of
from reachrl.plan.weights import gathered_gradients, gathered_weights
from reachrl.registry import resolve
from reachrl.run.cores import available_cores

HEADROOM = 0.05  # fraction of the device that stays free, for fragmentation

# Resident memory in GiB. A learner that has built nothing has 0.4; a process with one Meta-World environment 0.28, and
# each further one in it adds 0.03 (docs/benchmarks/rendering.md). The context of CUDA and cuBLAS is an estimate.
_LEARNER, _WORKER, _FURTHER, _CUDA = 0.4, 0.28, 0.03, 1.0
_CUDA_NAME = "CUDA context and workspace (estimate)"

Phase = Literal["always", "start", "rollout", "scoring", "update", "gradient sum", "optimiser step"]
PHASES: tuple[Phase, ...] = ("start", "rollout", "scoring", "update", "gradient sum", "optimiser step")


@dataclass(frozen=True, slots=True)
class Part:
    """One entry of a memory plan."""

    name: str
    bytes: float
    phase: Phase = "always"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All entries; phases follow one another, so only the largest adds to the peak."""

    parts: tuple[Part, ...]
    actor: "MemoryPlan | None" = None
    """Plan of an actor's device, where learners and actors have separate devices; `parts` is then a learner's."""

    def of(self, phase: Phase) -> float:
        """Return the bytes of one phase."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    @property
    def worst(self) -> Phase:
        """The phase with the most bytes."""
        return max(PHASES, key=self.of)

    @property
    def own_peak(self) -> float:
        """Peak of `parts`, in bytes."""
        return self.of("always") + self.of(self.worst)

    @property
    def peak(self) -> float:
        """Peak of the fuller device, in bytes."""
        return self.own_peak if self.actor is None else max(self.own_peak, self.actor.peak)

    def fits(self, device: Device) -> bool:
        """Return whether the peak leaves the headroom free."""
        return self.peak <= usable(device)


def usable(device: Device) -> float:
    """Return the device's memory without the headroom, in bytes."""
    return (1 - HEADROOM) * device.memory * GIB


def micro_rows(config: TrainConfig) -> int:
    """Return the rows of one training pass.

    Minibatches are drawn at random, so most rows of one may be in a single learner's block.
    """
    algorithm = algorithm_of(config)
    return min(algorithm.micro_batch_size, algorithm.minibatch_size, layout_of(config).block)


def score_rows(config: TrainConfig) -> int:
    """Return the rows of one scoring pass: of a learner's block, or of the last frames, which every learner scores."""
    layout = layout_of(config)
    return min(config.algorithm.score_batch_size, max(layout.block, layout.environments))


def plan_memory(config: TrainConfig, device: Device) -> MemoryPlan:
    """Predict the peak of one iteration after the critic's warm-up.

    All processes share a CPU. A GPU has a learner, an actor, or one of each where they are colocated.

    Args:
        config: the run.
        device: only its kind matters (which processes share the memory), not its size.

    Raises:
        ConfigError: the algorithm is a plug-in, the policy does not run on the meta device, the device cannot multiply
            as the policy asks, or there are too few environments for all processes.
        MissingExtra: a package that the policy needs is not installed.
    """
    if getattr(config.policy, "rollout_precision", None) == "float8" and device.capability is not None:
        check_float8(device.name, device.capability)
    layout, outline = layout_of(config), outline_of(config, accelerator=not device.is_cpu)
    learner = _learner(config, outline, device, layout)
    acting = [*_rollout(outline, layout), *_weights_to_act(outline, layout)]
    if device.is_cpu:
        processes = 1 if layout.alone else layout.learners + layout.actors
        parts = [*_times(layout.learners, learner), *_times(layout.actors, acting)]
        return MemoryPlan(_some([*parts, *_main_memory(config, outline, layout, processes)]))
    if layout.alone:
        return MemoryPlan(_some([*learner, *acting, Part(_CUDA_NAME, _CUDA * GIB)]))
    if layout.colocated:
        handed = Part("handed over to the actor", -_handed_over(outline, layout), "rollout")
        passing = [replace(part, phase="rollout") for part in acting]  # in main memory at other times
        return MemoryPlan(_some([*learner, *passing, handed, Part(f"twice {_CUDA_NAME}", 2 * _CUDA * GIB)]))
    context = Part(_CUDA_NAME, _CUDA * GIB)
    return MemoryPlan(_some([*learner, context]), MemoryPlan(_some([*acting, context])))


def _some(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.bytes)


def _times(count: int, parts: list[Part]) -> list[Part]:
    """Return the parts multiplied by a number of processes in the same memory."""
    name = f"{count} x " if count > 1 else ""
    return [replace(part, name=name + part.name, bytes=count * part.bytes) for part in parts]


def _learner(config: TrainConfig, outline: Outline, device: Device, layout: Layout) -> list[Part]:
    always = [*_held(outline, layout), Part("vision features of an iteration", layout.block * outline.features)]
    parts = [*always, *_scoring(config, outline, layout), *_update(config, outline, layout)]
    parts.append(Part("AdamW's temporaries", _adamw(outline, device) / layout.pieces, "optimiser step"))
    if layout.sharded:
        whole = _whole(outline) - sum(part.bytes for part in always)
        return [*parts, Part("the policy until it is split, before all else", max(whole, 0), "start")]
    # Types are mixed, as the value head is float32: so is the one tensor.
    together = 4 * sum(part.count for part in outline.weights if part.trained_by) * (layout.learners > 1)
    return [*parts, Part("all gradients in one tensor", together, "gradient sum")]


def _whole(outline: Outline) -> int:
    """Bytes of all weights."""
    return sum(part.bytes for part in outline.weights)


def trained(outline: Outline, group: str | None = None) -> int:
    """Return the bytes of the trained weights, of all or of one optimiser group."""
    return sum(part.bytes for part in outline.weights if part.trained_by and group in (None, part.trained_by))


def _held(outline: Outline, layout: Layout) -> list[Part]:
    """Weights, gradients and Adam states of a learner.

    Gradients of the last minibatch stay allocated until the next one, so also during the rollout.
    """
    size = trained(outline) / layout.pieces
    return [
        Part("frozen weights", (_whole(outline) - trained(outline)) / layout.pieces),
        Part("trainable weights", size),
        Part("gradients", size),
        Part("Adam states", 2 * size),
    ]


def _handed_over(outline: Outline, layout: Layout) -> float:
    """Return the bytes that a learner releases during the rollout; a sharded optimiser stays on the device."""
    gradients = trained(outline) / layout.pieces
    return gradients + layout.block * outline.features + (0 if layout.sharded else 2 * gradients)


def _main_memory(config: TrainConfig, outline: Outline, layout: Layout, processes: int) -> list[Part]:
    """Frames (a copy in each learner), simulators and libraries, which are in main memory on any device."""
    frames = 2 * layout.decisions * len(cameras(config)) * 3 * config.env.image_size**2  # a list, then one array
    workers = layout.environments
    if resolve("envs", config.env.kind).shares_process:
        workers = min(workers, available_cores() * layout.groups * layout.actors)
    simulators = _WORKER * workers + _FURTHER * (layout.environments - workers)
    resident = (_LEARNER * processes + simulators) * GIB
    return [
        *_times(layout.learners, [Part("frames of an iteration", frames)]),
        Part(f"{layout.environments} simulators, PyTorch", resident),
        Part("the first learner's whole policy, for checkpoints", layout.sharded * _whole(outline)),
    ]


def _weights_to_act(outline: Outline, layout: Layout) -> list[Part]:
    """The policy of an actor; an actor in the learner's process shares the learner's weights."""
    return [] if layout.alone else [Part("weights to act with", _whole(outline))]


def _rollout(outline: Outline, layout: Layout) -> list[Part]:
    rows = layout.decoded_rows
    return [
        Part("kept for acting: a copy of weights, recordings", outline.kept_for_acting(rows)),
        Part(f"decoding {rows} rows", outline.acting.peak(rows), "rollout"),
    ]


def _scoring(config: TrainConfig, outline: Outline, layout: Layout) -> list[Part]:
    """One pass over the rollout, and concatenating its features."""
    rows = score_rows(config)
    passing = max(outline.seeing.peak(rows) - rows * outline.features, outline.scoring.peak(rows))
    gathered = gathered_weights(outline.units, outline.rest, scoring=True) if layout.sharded else 0
    return [
        Part(
            f"a pass of {rows} rows, or joining the features", max(passing, layout.block * outline.features), "scoring"
        ),
        Part("weights gathered", gathered, "scoring"),
    ]


def _update(config: TrainConfig, outline: Outline, layout: Layout) -> list[Part]:
    rows = micro_rows(config)
    several = layout.sharded or rows < min(algorithm_of(config).minibatch_size, layout.block)
    passing, (fixed, row) = outline.training if several else outline.first_training
    kept = fixed + rows * row
    # In an only pass gradients come as activations go; all of them are counted as held.
    working = passing.peak(rows) - kept - (0 if several else trained(outline))
    parts = [
        Part(f"activations of {rows} rows", kept, "update"),
        Part("gradients not there yet" if working < 0 else "at work in the backward pass", working, "update"),
    ]
    if not layout.sharded:
        return parts
    used = [unit for unit, runs in zip(outline.units, outline.used, strict=True) if runs]
    return [
        *parts,
        Part("gradients on their way", gathered_gradients(used, outline.rest, kept), "update"),
        Part("weights gathered", gathered_weights(used, outline.rest, scoring=False), "update"),
    ]


def _adamw(outline: Outline, device: Device) -> int:
    """AdamW's temporaries: square roots of all of a group's second moments on a GPU; two of one tensor on a CPU."""
    if device.is_cpu:
        return 2 * max((each.nbytes for each in outline.policy.parameters() if each.requires_grad), default=0)
    return max(trained(outline, group) for group in ("policy", "value"))
