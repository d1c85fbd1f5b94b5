"""Peak memory of a device, by part: what stays all along, and the phase of an iteration that needs most beside it."""

from dataclasses import dataclass, replace
from typing import Literal

from reachrl.config.algorithm import PolicyGradientSection
from reachrl.config.policy import OpenVLAConfig, check_float8, recorded_rows
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.plan import activations
from reachrl.plan.crew import Crew, crew_of
from reachrl.plan.device import GIB, Device
from reachrl.plan.gathering import gathered_gradients, gathered_weights
from reachrl.plan.parameters import (
    Weights,
    adapter_parameters,
    choices,
    layer,
    layer_parameters,
    linear_parameters,
    projector_parameters,
    weights,
)

HEADROOM = 0.05  # share of the device that is left free, for pieces the allocator cannot use

# Resident memory in GiB. A learner that has built nothing has 0.4; 5.5 were measured in all processes together with 16
# Meta-World workers (docs/benchmarks/quickstart.md), which leaves 0.28 for each. CUDA's context and cuBLAS's workspace
# are an estimate.
_LEARNER, _WORKER, _CUDA = 0.4, 0.28, 1.0
_CUDA_NAME = "CUDA context and workspace (estimate)"

Phase = Literal["always", "start", "rollout", "scoring", "update", "gradient sum", "optimiser step"]
PHASES: tuple[Phase, ...] = ("start", "rollout", "scoring", "update", "gradient sum", "optimiser step")


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory."""

    name: str
    bytes: float
    phase: Phase = "always"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Everything that takes memory; phases follow one another, so only the largest counts."""

    parts: tuple[Part, ...]
    actor: "MemoryPlan | None" = None
    """Of an actor's device, where learners and actors have devices of their own; the parts are then a learner's."""

    def of(self, phase: Phase) -> float:
        """Bytes of one phase alone."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.of)

    @property
    def own_peak(self) -> float:
        """Bytes of these parts at the worst moment."""
        return self.of("always") + self.of(self.worst)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment, on the device that needs most."""
        return self.own_peak if self.actor is None else max(self.own_peak, self.actor.peak)

    def fits(self, device: Device) -> bool:
        """Whether the peak leaves the device its headroom."""
        return self.peak <= usable(device)


def usable(device: Device) -> float:
    """Bytes that a plan may fill."""
    return (1 - HEADROOM) * device.memory * GIB


def sections(config: TrainConfig) -> tuple[OpenVLAConfig, PolicyGradientSection]:
    """The policy's and the algorithm's section.

    Raises:
        ConfigError: policy or algorithm is a plug-in, whose sizes are not known.
    """
    if not isinstance(config.policy, OpenVLAConfig):
        kind = getattr(config.policy, "kind", "?")
        raise ConfigError(f"policy.kind={kind!r}: a plan needs the sizes of an `openvla` policy, and knows no others.")
    if not isinstance(config.algorithm, PolicyGradientSection):
        kind = getattr(config.algorithm, "kind", "?")
        raise ConfigError(
            f"algorithm.kind={kind!r}: a plan knows clipped policy gradients such as `ppo`, and nothing else."
        )
    return config.policy, config.algorithm


def micro_rows(config: TrainConfig) -> int:
    """Rows that go through a training pass together.

    Minibatches are drawn at random: now and then most of one falls into a single learner's block.
    """
    _, algorithm = sections(config)
    return min(algorithm.micro_batch_size, algorithm.minibatch_size, crew_of(config).block)


def score_rows(config: TrainConfig) -> int:
    """Rows that are scored together: of a learner's block, or of the last frames, which every learner scores."""
    _, algorithm = sections(config)
    crew = crew_of(config)
    return min(algorithm.score_batch_size, max(crew.block, crew.environments))


def plan_memory(config: TrainConfig, device: Device) -> MemoryPlan:
    """Predict the peak of one steady iteration (after the critic's warm-up).

    All processes share a CPU; each GPU has a learner, an actor, or where they are colocated one of each.

    Args:
        config: the run.
        device: its kind decides what shares memory with the learner; its size does not matter here.

    Raises:
        ConfigError: policy or algorithm is a plug-in, the device cannot multiply as the policy asks, or there are too
            few environments for all processes.
    """
    policy, algorithm = sections(config)
    if policy.rollout_precision == "float8" and device.capability is not None:
        check_float8(device.name, device.capability)
    crew = crew_of(config)
    learner, actor = _learner(config, device, crew), _actor(config, device, crew)
    if device.is_cpu:
        processes = 1 if crew.alone else crew.learners + crew.actors
        parts = [*_times(crew.learners, learner), *_times(crew.actors, actor), *_main_memory(config, crew, processes)]
    elif crew.alone:
        parts = [*learner, *actor, Part(_CUDA_NAME, _CUDA * GIB)]
    elif crew.colocated:
        handed = Part("handed over to the actor", -_handed_over(policy, algorithm, crew), "rollout")
        passing = [replace(part, phase="rollout") for part in actor]  # in main memory at other times
        parts = [*learner, *passing, handed, Part(f"twice {_CUDA_NAME}", 2 * _CUDA * GIB)]
    else:
        context = Part(_CUDA_NAME, _CUDA * GIB)
        return MemoryPlan(_some([*learner, context]), MemoryPlan(_some([*actor, context])))
    return MemoryPlan(_some(parts))


def _some(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.bytes)


def _times(count: int, parts: list[Part]) -> list[Part]:
    """The parts of so many processes in the same memory."""
    name = f"{count} x " if count > 1 else ""
    return [replace(part, name=name + part.name, bytes=count * part.bytes) for part in parts]


def _learner(config: TrainConfig, device: Device, crew: Crew) -> list[Part]:
    policy, algorithm = sections(config)
    held = weights(policy, algorithm)
    trained = [part for part in held if part.trained_by is not None]
    features = _features(policy, algorithm, crew)
    always = [*_held(held, crew), Part("vision features of an iteration", features)]
    parts = [*always, *_scoring(config, crew), *_update(config, crew, sum(part.bytes for part in trained))]
    parts += _optimiser_step(policy, held, device, crew)
    if crew.sharded:
        whole = sum(part.bytes for part in held) - sum(part.bytes for part in always)
        return [*parts, Part("the policy until it is split, before all else", max(whole, 0), "start")]
    # Types are mixed, as the value head is float32: so is the one tensor.
    together = 4 * sum(part.count for part in trained) * (crew.learners > 1)
    return [*parts, Part("all gradients in one tensor", together, "gradient sum")]


def _actor(config: TrainConfig, device: Device, crew: Crew) -> list[Part]:
    """What acting needs; beside a learner in the same process its weights are there already."""
    policy, algorithm = sections(config)
    own = 0 if crew.alone else sum(part.bytes for part in weights(policy, algorithm))
    copied = Part("copy to decode with", _copied(policy))
    return [Part("weights to act with", own), copied, *_rollout(policy, crew.decoded_rows, device)]


def _handed_over(policy: OpenVLAConfig, algorithm: PolicyGradientSection, crew: Crew) -> float:
    """Bytes of a learner that are not on its device during the rollout; an optimiser in pieces stays there."""
    held = {part.name: part.bytes for part in _held(weights(policy, algorithm), crew)}
    features = _features(policy, algorithm, crew)
    return held["gradients"] + features + (0 if crew.sharded else held["Adam states"])


def _features(policy: OpenVLAConfig, algorithm: PolicyGradientSection, crew: Crew) -> int:
    """Bytes of the vision features that a learner keeps of an iteration."""
    return 0 if algorithm.train_vision else crew.block * activations.features_row(policy)


def _held(held: tuple[Weights, ...], crew: Crew) -> list[Part]:
    """A learner's weights, gradients and Adam's states.

    Gradients of the last minibatch stay until the next one begins, so they are there during the rollout too.
    """
    trained = [part for part in held if part.trained_by is not None]
    size = sum(part.bytes for part in trained) / crew.pieces
    return [
        Part("frozen weights", sum(part.bytes for part in held if part.trained_by is None) / crew.pieces),
        Part("trainable weights", size),
        Part("gradients", size),
        Part("Adam states", 2 * size),
    ]


def _main_memory(config: TrainConfig, crew: Crew, processes: int) -> list[Part]:
    """What lies in main memory wherever the policy does: frames, which each learner has, simulators and libraries."""
    frames = 2 * crew.decisions * 3 * config.env.image_size**2  # a list of them, then one array
    resident = (_LEARNER * processes + _WORKER * crew.environments) * GIB
    whole = sum(part.bytes for part in weights(*sections(config)))
    return [
        *_times(crew.learners, [Part("frames of an iteration", frames)]),
        Part(f"{crew.environments} simulators, PyTorch", resident),
        Part("the first learner's whole policy, for checkpoints", crew.sharded * whole),
    ]


def _copied(policy: OpenVLAConfig) -> int:
    """Bytes of the copy to decode with: of 4-bit maps in the type of their products, or all maps in 8 bits."""
    if not policy.rollout_copy:
        return 0
    stored, computed = activations.numbers(policy)
    width = computed if policy.four_bit else stored
    if policy.rollout_precision == "float8":
        width = 1  # its scales are less than a thousandth
    return projector_parameters(policy) * stored + layer_parameters(policy) * width


def _cache(policy: OpenVLAConfig, rows: int, device: Device) -> Part:
    """The key-value cache, which recorded steps keep, with rows up to the next size that is recorded."""
    recorded = policy.records_steps and not device.is_cpu
    rows = recorded_rows(rows) if recorded else rows
    name = f"key-value cache of {rows} rows"
    return Part(name, rows * activations.cache_row(policy), "always" if recorded else "rollout")


def _rollout(policy: OpenVLAConfig, envs: int, device: Device) -> list[Part]:
    working = max(
        activations.working_row(policy, activations.prompt_tokens(policy), decoding=True),
        activations.vision_working_row(policy),
    )
    given = activations.features_row(policy) + activations.pixels_row(policy)
    head = activations.head_copy(policy) + envs * 4 * 4 * choices(policy)  # its copy, logits and what is made of them
    passing = envs * given + max(envs * working, head)
    spared = policy.four_bit and policy.rollout_copy and policy.critic == "shared"  # the copy is decoded already
    return [
        _cache(policy, envs, device),
        Part(f"prefill of {envs} rows", passing, "rollout"),
        Part("weights cast or decoded for the pass", 0 if spared else _cast_weights(policy, training=False), "rollout"),
    ]


def _scoring(config: TrainConfig, crew: Crew) -> list[Part]:
    """One pass over the rollout; the old features stay until the new ones are joined into one tensor."""
    policy, algorithm = sections(config)
    batch = score_rows(config)
    tokens = activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    working = max(
        activations.working_row(policy, tokens, decoding=False),
        activations.vision_working_row(policy) + activations.pixels_row(policy),
    )
    passing = max(batch * working, activations.head_copy(policy)) + _cast_weights(policy, training=False)
    features = _features(policy, algorithm, crew)
    return [
        Part("new vision features", features, "scoring"),
        Part(f"a pass of {batch} rows, or joining the features", max(passing, features), "scoring"),
        Part("weights gathered", crew.sharded * gathered_weights(policy, algorithm, scoring=True), "scoring"),
    ]


def _update(config: TrainConfig, crew: Crew, gradients: float) -> list[Part]:
    policy, algorithm = sections(config)
    rows = micro_rows(config)
    row = activations.training_row(policy, train_vision=algorithm.train_vision)
    names = {
        "vision": "vision towers",
        "actor": "the actor",
        "critic": "the critic",
        "logits": f"{choices(policy)} logits",
    }
    inputs = activations.pixels_row(policy) if algorithm.train_vision else activations.features_row(policy)
    tokens = activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    again = rows * activations.layer_row(policy, tokens) if policy.gradient_checkpointing else 0
    kept = rows * sum(row.values())
    several = rows < min(algorithm.minibatch_size, crew.block)
    if crew.sharded:
        coming = gathered_gradients(policy, algorithm, kept)
    else:
        coming = _gradients_on_their_way(policy, gradients, kept, again, several)
    return [
        *(Part(f"activations of {names[name]}, {rows} rows", rows * size, "update") for name, size in row.items()),
        Part("one layer computed again", again, "update"),
        Part("gradients not there yet" if coming < 0 else "gradients on their way", coming, "update"),
        Part("inputs of the micro-batch", rows * inputs, "update"),
        Part("weights cast or decoded for the pass", _cast_weights(policy, training=True), "update"),
        Part("the head in float32", activations.head_copy(policy), "update"),
        Part("weights gathered", crew.sharded * gathered_weights(policy, algorithm, scoring=False), "update"),
    ]


def _gradients_on_their_way(policy: OpenVLAConfig, gradients: float, kept: float, again: float, several: bool) -> float:
    """Bytes by which the worst moment of a backward pass differs from all gradients beside all activations.

    Args:
        policy: the section.
        gradients: all of them, bytes.
        kept: activations, bytes.
        again: those of a layer that is computed again, bytes.
        several: whether a minibatch takes several passes. Then a gradient is made before it is added to that of the
            pass before, the largest being the head's with all rows of the vocabulary. In an only pass (less than
            nothing) gradients come as activations go: the worst moment is the beginning, when those of the head and
            of the last layer have come and hardly anything has gone, or the end.
    """
    llm, full = policy.language_model, policy.lora is None
    head = llm.vocab_size * llm.hidden_size * activations.numbers(policy)[0] * full
    if several:
        early = head * (policy.critic == "shared")  # a critic's pass came later, so it is let go before
        return max(0.0, early - again)
    one_layer = activations.numbers(policy)[0] * sum(linear.parameters for linear in layer(llm).linears)
    last = one_layer if full else 4 * adapter_parameters(policy, "language_model") / llm.num_layers
    beginning = kept + head + last + again
    end = max(gradients, gradients - head - last + again)
    return max(beginning, end) - gradients - kept - again


def _cast_weights(policy: OpenVLAConfig, *, training: bool) -> int:
    """Bytes of the bfloat16 copies that autocast makes of float32 weights, or of the largest 4-bit map once decoded.

    Copies of trained weights are made once a pass. Those of frozen weights are made at each use; backward keeps them,
    but for those of 4-bit maps, which it decodes again.
    """
    stored, computed = activations.numbers(policy)
    if policy.four_bit:
        return computed * layer(policy.language_model).down.parameters
    if stored == computed:
        return 0
    passes = 1 if policy.critic == "shared" else 2
    if policy.lora is None:
        return computed * passes * linear_parameters(policy)
    if training and not policy.gradient_checkpointing:
        return computed * passes * (linear_parameters(policy) - projector_parameters(policy))
    return computed * layer(policy.language_model).down.parameters


def _optimiser_step(policy: OpenVLAConfig, held: tuple[Weights, ...], device: Device, crew: Crew) -> list[Part]:
    """AdamW's temporaries: square roots of all of a group's second moments on a GPU; two of one tensor on a CPU."""
    if device.is_cpu:
        llm, stored = policy.language_model, activations.numbers(policy)[0]
        head = 4 * llm.hidden_size * policy.value_hidden_size
        matrix = (
            4 * llm.intermediate_size * policy.lora.rank if policy.lora else stored * llm.vocab_size * llm.hidden_size
        )
        size = 2 * max(head, matrix)
    else:
        size = max(sum(part.bytes for part in held if part.trained_by == group) for group in ("policy", "value"))
    return [Part("AdamW's temporaries", size / crew.pieces, "optimiser step")]
