"""Seconds of one iteration, by part: of arithmetic, bytes moved and calls started, whichever takes longest."""

import math
from dataclasses import dataclass

from reachrl.config.algorithm import KL_ROWS, STOP_ROWS
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.train import TrainConfig
from reachrl.plan import activations, compute
from reachrl.plan.crew import crew_of
from reachrl.plan.device import Device
from reachrl.plan.memory import micro_rows, sections
from reachrl.plan.parameters import (
    NF4_BYTES,
    adapter_parameters,
    head_parameters,
    layer_parameters,
    weights,
)

# Decisions per second of Meta-World's simulators alone on two cores: 272, 363 and 455 were measured
# (docs/benchmarks/rendering.md, "One decision" and below). It cannot be known for another machine.
DECISIONS_PER_SECOND = 360.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """One part of an iteration."""

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0  # read and written


@dataclass(frozen=True, slots=True)
class TimePlan:
    """The parts of an iteration, which follow one another."""

    stretches: tuple[Stretch, ...]

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return sum(stretch.seconds for stretch in self.stretches)


def plan_time(config: TrainConfig, device: Device, decisions_per_second: float = DECISIONS_PER_SECOND) -> TimePlan:
    """Predict one steady iteration: every epoch is finished, and the policy is trained along with its critic.

    Encoding frames, the process reward, advantages and checkpoints are left out: they are small. Of several processes,
    communication, waiting for the slowest and what is done meanwhile are left out too: they are not modelled.

    Args:
        config: the run; where processes share the work, one learner's and one actor's share is counted.
        device: that each of them has.
        decisions_per_second: of all simulators together, without a policy.

    Raises:
        ConfigError: policy or algorithm is a plug-in.
    """
    decisions = config.rollout.num_steps * config.env.num_envs
    simulators = Stretch(name="environment steps", seconds=decisions / decisions_per_second)
    learning = _scoring(config, device), _update(config, device), _kl(config, device)
    return TimePlan((simulators, *_acting(config, device), *learning))


def pass_seconds(
    policy: OpenVLAConfig, device: Device, *, flops: float, moved: float, layers: float, training: bool = False
) -> float:
    """Seconds of one pass.

    Args:
        policy: decides the number format.
        device: peak figures and the share of them that is reached.
        flops: products of the pass.
        moved: bytes read and written.
        layers: decoder layers started one after another.
        training: whether gradients are computed.

    Source: Williams et al. 2009, Roofline, section 3.
    """
    share = device.training_share if training else device.forward_share
    arithmetic = flops / (share * device.flops(activations.numbers(policy)[1]))
    return max(arithmetic, moved / (device.bandwidth_share * 1e9 * device.bandwidth), layers * device.layer_call_s)


def _layer_calls(policy: OpenVLAConfig) -> int:
    """Decoder layers of one pass, the critic's included."""
    return policy.language_model.num_layers * (1 if policy.critic == "shared" else 2)


def _read_weights(config: TrainConfig, *, acting: bool = False) -> float:
    """Bytes of the weights that a whole pass reads, and writes where it decodes them."""
    policy, algorithm = sections(config)
    unread = (head_parameters(policy.language_model) * 2) * activations.numbers(policy)[0]  # tables: few rows are read
    held = sum(part.bytes for part in weights(policy, algorithm)) - unread
    return held + policy.four_bit * (_read_maps(policy, acting=acting) - NF4_BYTES * layer_parameters(policy))


def _read_maps(policy: OpenVLAConfig, *, acting: bool) -> float:
    """Bytes that the linear maps of the decoder layers cost in a pass.

    A 4-bit one is read, written out in the type of its products and read again; kernels for few rows spare that.
    """
    stored, computed = activations.numbers(policy)
    count = layer_parameters(policy)
    if acting and policy.rollout_precision == "float8":
        return count
    if not policy.four_bit:
        return count * stored
    return count * (computed if acting and policy.rollout_copy else NF4_BYTES + 2 * computed)


def _acting(config: TrainConfig, device: Device) -> list[Stretch]:
    policy, crew = sections(config)[0], crew_of(config)
    rows, calls = crew.decoded_rows, config.rollout.num_steps * crew.groups
    llm = policy.language_model
    tokens = activations.prompt_tokens(policy)
    flops = float(rows * compute.prefill(policy))
    # Each layer writes and reads what is at work at its widest moment.
    working = 2 * llm.num_layers * activations.working_row(policy, tokens, decoding=True)
    moved = _read_weights(config, acting=True) + rows * (working + activations.cache_row(policy))
    prefill = pass_seconds(policy, device, flops=flops, moved=moved, layers=_layer_calls(policy))
    steps = policy.num_action_tokens - 1
    step_flops = float(rows * compute.decode_steps(policy))
    trunk = _read_maps(policy, acting=True)
    adapters = 0 if policy.rollout_copy else 4 * adapter_parameters(policy, "language_model")
    step_moved = float(steps * (trunk + adapters + rows * activations.cache_row(policy)))
    recorded = policy.records_steps and not device.is_cpu  # started in one piece
    started = 0 if recorded else steps * llm.num_layers
    decoding = pass_seconds(policy, device, flops=step_flops, moved=step_moved, layers=started)
    return [
        Stretch(name="prefill", seconds=calls * prefill, flops=calls * flops, bytes=calls * moved),
        Stretch(name="decode steps", seconds=calls * decoding, flops=calls * step_flops, bytes=calls * step_moved),
    ]


def _scoring(config: TrainConfig, device: Device) -> Stretch:
    """Old log-probabilities and values of a learner's decisions, values of all frames that follow the last ones."""
    policy, algorithm = sections(config)
    crew = crew_of(config)
    rows = crew.block
    row = compute.vision(policy).forward + compute.evaluation(policy, train_vision=algorithm.train_vision).forward
    last = crew.environments + crew.decisions / config.env.max_steps  # bootstraps, and episodes that end at their limit
    flops = rows * row + last * compute.values(policy)
    tokens = activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    working = 2 * policy.language_model.num_layers * activations.working_row(policy, tokens, decoding=False)
    batches = math.ceil(rows / algorithm.score_batch_size) + math.ceil(last / algorithm.score_batch_size)
    moved = batches * _read_weights(config) + (rows + last) * working
    seconds = pass_seconds(policy, device, flops=flops, moved=moved, layers=batches * _layer_calls(policy))
    return Stretch(name="scoring", seconds=seconds, flops=flops, bytes=moved)


def _kl(config: TrainConfig, device: Device) -> Stretch:
    """The KL of the update, without gradients: after the last step and, where it can stop training, amid them."""
    policy, algorithm = sections(config)
    crew = crew_of(config)
    row = compute.evaluation(policy, train_vision=algorithm.train_vision).forward
    row += compute.vision(policy).forward * algorithm.train_vision
    rows, looks = min(KL_ROWS, crew.decisions), 0
    if algorithm.target_kl is not None:
        looks = algorithm.epochs * math.ceil(crew.decisions / max(STOP_ROWS, algorithm.minibatch_size)) - 1
    passes = math.ceil(rows / crew.learners / algorithm.score_batch_size) + looks
    rows = (rows + looks * min(STOP_ROWS, crew.decisions)) / crew.learners
    tokens = activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    working = 2 * policy.language_model.num_layers * activations.working_row(policy, tokens, decoding=False)
    moved = passes * _read_weights(config) + rows * working
    layers = passes * _layer_calls(policy)
    seconds = pass_seconds(policy, device, flops=rows * row, moved=moved, layers=layers)
    return Stretch(name="KL of the update", seconds=seconds, flops=rows * row, bytes=moved)


def _update(config: TrainConfig, device: Device) -> Stretch:
    policy, algorithm = sections(config)
    crew = crew_of(config)
    rows = crew.decisions / crew.learners
    row = compute.evaluation(policy, train_vision=algorithm.train_vision).total
    row += compute.vision(policy).total * algorithm.train_vision
    flops = float(algorithm.epochs * rows * row)
    steps = algorithm.epochs * math.ceil(crew.decisions / algorithm.minibatch_size)
    passes = steps * math.ceil(min(algorithm.minibatch_size, crew.decisions) / crew.learners / micro_rows(config))
    trained = sum(part.bytes for part in weights(policy, algorithm) if part.trained_by is not None)
    saved = sum(activations.training_row(policy, train_vision=algorithm.train_vision).values())
    again = policy.language_model.num_layers * activations.layer_row(
        policy, activations.prompt_tokens(policy) + policy.num_action_tokens - 1
    )
    # Kept tensors are written, read by the next operation, read again, and as much goes through as gradients.
    tensors = algorithm.epochs * rows * 4 * (saved + again * policy.gradient_checkpointing)
    # Forward and backward read the weights; a gradient is written; AdamW reads 4 and writes 3 numbers a parameter.
    moved = tensors + passes * (2 * _read_weights(config) + trained) + steps * 7 * trained / crew.pieces
    layers = passes * _layer_calls(policy) * (3 + policy.gradient_checkpointing)
    seconds = pass_seconds(policy, device, flops=flops, moved=moved, layers=layers, training=True)
    return Stretch(name=f"PPO, {algorithm.epochs} epochs", seconds=seconds, flops=flops, bytes=moved)
