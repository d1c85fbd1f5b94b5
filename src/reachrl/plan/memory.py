"""The learner's peak memory, by part: what stays all along, and the phase of an iteration that needs most beside it."""

from dataclasses import dataclass
from typing import Literal

from reachrl.config.policy import FLOAT8_CAPABILITY, OpenVLAConfig, recorded_rows
from reachrl.config.ppo import PPOConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.plan import activations
from reachrl.plan.device import GIB, Device
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

Phase = Literal["always", "rollout", "scoring", "update", "optimiser step"]
PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update", "optimiser step")


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

    def of(self, phase: Phase) -> float:
        """Bytes of one phase alone."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.of)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return self.of("always") + self.of(self.worst)

    def fits(self, device: Device) -> bool:
        """Whether the peak leaves the device its headroom."""
        return self.peak <= usable(device)


def usable(device: Device) -> float:
    """Bytes that a plan may fill."""
    return (1 - HEADROOM) * device.memory * GIB


def sections(config: TrainConfig) -> tuple[OpenVLAConfig, PPOConfig]:
    """The policy's and the algorithm's section.

    Raises:
        ConfigError: the policy is a plug-in, whose sizes are not known, or decoded by vLLM.
    """
    if not isinstance(config.policy, OpenVLAConfig):
        kind = getattr(config.policy, "kind", "?")
        raise ConfigError(f"policy.kind={kind!r}: a plan needs the sizes of an `openvla` policy, and knows no others.")
    if config.policy.decoder != "own":
        raise ConfigError(
            f'policy.decoder="{config.policy.decoder}": a plan knows the own decoder only, not what an engine needs. '
            'Plan with policy.decoder="own" and keep room for a second copy of the weights'
        )
    assert isinstance(config.ppo, PPOConfig)
    return config.policy, config.ppo


def micro_rows(config: TrainConfig) -> int:
    """Rows that go through a training pass together."""
    _, ppo = sections(config)
    return min(ppo.micro_batch_size, ppo.minibatch_size, config.num_steps * config.env.num_envs)


def plan_memory(config: TrainConfig, device: Device) -> MemoryPlan:
    """Predict the peak of one steady iteration (after the critic's warm-up).

    Args:
        config: the run.
        device: its kind decides what shares memory with the learner; its size does not matter here.

    Raises:
        ConfigError: the policy is a plug-in, or the device cannot multiply as it asks.
    """
    policy, ppo = sections(config)
    _check_arithmetic(policy, device)
    held = weights(policy, ppo)
    gradients = sum(part.bytes for part in held if part.trained_by is not None)
    parts = [*_held(held), *_always(config, device), *_rollout(config, device), *_scoring(config)]
    parts += [*_update(config, gradients), *_optimiser_step(policy, held, device)]
    return MemoryPlan(tuple(part for part in parts if part.bytes))


def _check_arithmetic(policy: OpenVLAConfig, device: Device) -> None:
    """Refuse what the copy to decode with refuses on the device itself."""
    if policy.rollout_precision != "float8" or device.capability is None or device.capability >= FLOAT8_CAPABILITY:
        return
    major, minor = device.capability
    raise ConfigError(
        f"policy.rollout_precision=float8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), {device.name} "
        f"has {major}.{minor}; set policy.rollout_precision=as_trained"
    )


def _held(held: tuple[Weights, ...]) -> list[Part]:
    """Weights, gradients and Adam's states.

    Gradients of the last minibatch stay until the next one begins, so they are there during the rollout too.
    """
    trained = [part for part in held if part.trained_by is not None]
    size = sum(part.bytes for part in trained)
    return [
        Part("frozen weights", sum(part.bytes for part in held if part.trained_by is None)),
        Part("trainable weights", size),
        Part("gradients", size),
        Part("Adam states", 2 * size),
    ]


def _always(config: TrainConfig, device: Device) -> list[Part]:
    policy, ppo = sections(config)
    rows = config.num_steps * config.env.num_envs
    cached = 0 if ppo.train_vision else rows * activations.features_row(policy)
    parts = [Part("copy to decode with", _copied(policy)), Part("vision features of an iteration", cached)]
    if not device.is_cpu:
        return [*parts, Part("CUDA context and workspace (estimate)", _CUDA * GIB)]
    frames = 2 * rows * 3 * config.env.image_size**2  # a list of them, then one array
    processes = (_LEARNER + _WORKER * config.env.num_envs) * GIB
    return [
        *parts,
        Part("frames of an iteration", frames),
        Part(f"{config.env.num_envs} simulators, PyTorch", processes),
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


def _rollout(config: TrainConfig, device: Device) -> list[Part]:
    policy, envs = sections(config)[0], config.env.num_envs
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


def _scoring(config: TrainConfig) -> list[Part]:
    """One pass over the rollout; the old features stay until the new ones are joined into one tensor."""
    policy, ppo = sections(config)
    rows = config.num_steps * config.env.num_envs
    batch = min(ppo.score_batch_size, rows)
    tokens = activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    working = max(
        activations.working_row(policy, tokens, decoding=False),
        activations.vision_working_row(policy) + activations.pixels_row(policy),
    )
    passing = max(batch * working, activations.head_copy(policy)) + _cast_weights(policy, training=False)
    features = 0 if ppo.train_vision else rows * activations.features_row(policy)
    return [
        Part("new vision features", features, "scoring"),
        Part(f"a pass of {batch} rows, or joining the features", max(passing, features), "scoring"),
    ]


def _update(config: TrainConfig, gradients: float) -> list[Part]:
    policy, ppo = sections(config)
    rows = micro_rows(config)
    row = activations.training_row(policy, train_vision=ppo.train_vision)
    names = {
        "vision": "vision towers",
        "actor": "the actor",
        "critic": "the critic",
        "logits": f"{choices(policy)} logits",
    }
    inputs = activations.pixels_row(policy) if ppo.train_vision else activations.features_row(policy)
    tokens = activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    again = rows * activations.layer_row(policy, tokens) if policy.gradient_checkpointing else 0
    kept = rows * sum(row.values())
    several = rows < min(ppo.minibatch_size, config.num_steps * config.env.num_envs)
    coming = _gradients_on_their_way(policy, gradients, kept, again, several)
    return [
        *(Part(f"activations of {names[name]}, {rows} rows", rows * size, "update") for name, size in row.items()),
        Part("one layer computed again", again, "update"),
        Part("gradients not there yet" if coming < 0 else "gradients on their way", coming, "update"),
        Part("inputs of the micro-batch", rows * inputs, "update"),
        Part("weights cast or decoded for the pass", _cast_weights(policy, training=True), "update"),
        Part("the head in float32", activations.head_copy(policy), "update"),
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


def _optimiser_step(policy: OpenVLAConfig, held: tuple[Weights, ...], device: Device) -> list[Part]:
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
    return [Part("AdamW's temporaries", size, "optimiser step")]
