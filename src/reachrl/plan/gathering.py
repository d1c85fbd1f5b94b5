"""Bytes that a learner with a piece of the weights needs whole for a while (`backend.sharding=full`, FSDP2).

A policy falls into units (`Policy.sharding_units`): decoder layers, projectors, towers, value head. A unit's weights
are gathered before it computes and let go afterwards; what is in no unit is gathered for the whole pass.
"""

from dataclasses import dataclass

from reachrl.config.algorithm import PolicyGradientSection
from reachrl.config.policy import OpenVLAConfig
from reachrl.plan.parameters import (
    BYTES,
    adapter_parameters,
    layer,
    projector_parameters,
    value_head_parameters,
    vision_parameters,
)


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes of weights that are gathered together, and of their gradients."""

    weights: int
    gradients: int

    def __add__(self, other: "Unit") -> "Unit":
        return Unit(self.weights + other.weights, self.gradients + other.gradients)


def towers(policy: OpenVLAConfig, algorithm: PolicyGradientSection) -> Unit:
    """The vision towers, one unit together."""
    adapters = 4 * adapter_parameters(policy, "vision")
    whole = BYTES[policy.dtype] * vision_parameters(policy)
    return Unit(whole + adapters, algorithm.train_vision * (adapters + whole * (policy.lora is None)))


def units(policy: OpenVLAConfig) -> tuple[Unit, ...]:
    """All others, of each kind one; the last decoder layer is in none."""
    head = 4 * value_head_parameters(policy)
    found = [_mapped(policy, "projector"), Unit(head, head)]
    return (*found, _mapped(policy, "language_model")) if policy.language_model.num_layers > 1 else tuple(found)


def rest(policy: OpenVLAConfig) -> Unit:
    """What is in no unit: of each trunk the embedding, the last layer and its normalisation; the actor's head."""
    llm, stored = policy.language_model, BYTES[policy.dtype]
    table, norm = stored * llm.vocab_size * llm.hidden_size, stored * llm.hidden_size
    actor = 2 * table + norm
    found = Unit(actor, actor * (policy.lora is None)) + _mapped(policy, "language_model")
    if policy.critic == "separate":
        critic = table + norm + stored * _layer_parameters(policy)
        found += Unit(critic, critic)
    return found


def _layer_parameters(policy: OpenVLAConfig) -> int:
    llm = policy.language_model
    return sum(linear.parameters for linear in layer(llm).linears) + 2 * llm.hidden_size


def _mapped(policy: OpenVLAConfig, part: str) -> Unit:
    """The projector or one decoder layer, with all adapters on it; a separate critic's is no larger."""
    sets = 2 if policy.critic == "adapter" else 1
    adapters = 4 * sets * adapter_parameters(policy, part)
    if part == "language_model":
        adapters //= policy.language_model.num_layers
    count = projector_parameters(policy) if part == "projector" else _layer_parameters(policy)
    whole = BYTES[policy.dtype] * count
    trained = policy.lora is None or policy.critic == "separate"
    return Unit(whole + adapters, adapters + whole * trained)


def gathered_weights(policy: OpenVLAConfig, algorithm: PolicyGradientSection, *, scoring: bool) -> int:
    """Bytes gathered at the widest moment of a pass: what is in no unit, and beside it the largest unit twice.

    Pieces arrive in a buffer, from which the weights are copied; in the backward pass the next unit's buffer is filled
    while a unit computes. In the forward pass, the widest of scoring, a layer's buffer is kept until the next layer's
    weights are copied.
    """
    always = rest(policy).weights
    used = [*units(policy), *([towers(policy, algorithm)] if scoring or algorithm.train_vision else [])]
    layers = 3 * _mapped(policy, "language_model").weights * scoring
    return always + max(always, 2 * max(unit.weights for unit in used), layers)


def gathered_gradients(policy: OpenVLAConfig, algorithm: PolicyGradientSection, kept: float) -> float:
    """Bytes of gradients that are not in pieces yet, at the widest moment of a backward pass.

    A unit's are copied into a buffer to be summed over the learners. Those in no unit stay to the end of the pass, when
    no activations are left.

    Args:
        policy: the section.
        algorithm: the section.
        kept: bytes of activations.
    """
    always = rest(policy).gradients
    used = [*units(policy), towers(policy, algorithm)]
    return max(always + 2 * max(unit.gradients for unit in used), 2 * always - kept)
