"""Parameters of a policy by part and optimiser group, and sizes of FSDP all-gathers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from reachrl.policies.base import Policy


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one part of the policy."""

    name: str
    count: int
    bytes: int
    """Memory of the parameters; of 4-bit ones including their scales."""
    trained_by: str | None
    """Optimiser group, `policy` or `value`; None: frozen."""

    @property
    def width(self) -> float:
        """Bytes of one parameter."""
        return self.bytes / self.count


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes of one FSDP unit: its weights and their gradients."""

    weights: int
    gradients: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> "Unit":
        """Return the unit of `parameters`."""
        sizes = [(parameter.nbytes, parameter.requires_grad) for parameter in parameters]
        return cls(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def weights(policy: Policy) -> tuple[Weights, ...]:
    """Return all parameters of `policy`, grouped by module, data type and optimiser group."""
    value = {id(parameter) for parameter in policy.parameter_groups()["value"]}
    found: dict[tuple[str, float, str | None], tuple[int, int]] = {}
    for name, parameter in policy.named_parameters():
        part = name.split(".")[0].replace("_", " ")
        role = ("value" if id(parameter) in value else "policy") if parameter.requires_grad else None
        count, size = _size(parameter)
        key = (f"adapters of the {part}" if ".lora_" in name else part, size / count, role)
        if size < count:  # 4 bits: each layer has its own scales
            key = (f"{part}, 4 bits", 0, role)
        before = found.get(key, (0, 0))
        found[key] = (before[0] + count, before[1] + size)
    return tuple(Weights(name, *sizes, role) for (name, _, role), sizes in found.items())


def _size(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the number of weights and the bytes of a parameter; of a 4-bit one including its scales."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel(), parameter.nbytes
    return math.prod(state.shape), parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def units(policy: Policy) -> tuple[list[Unit], Unit]:
    """Return the units of `sharding_units`, in order, and the parameters in none of them as one more unit."""
    modules = policy.sharding_units()
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    rest = Unit.of(parameter for parameter in policy.parameters() if id(parameter) not in inside)
    return [Unit.of(module.parameters()) for module in modules], rest


def gathered_weights(used: list[Unit], rest: Unit, *, scoring: bool) -> int:
    """Return the peak of gathered weights in a pass: parameters in no unit, plus twice the largest unit.

    All-gather fills a buffer, from which weights are copied out. In the backward pass the next unit's buffer is filled
    while a unit computes. In the forward pass (scoring) a unit's buffer is freed after the next unit is copied out.
    """
    largest = max((unit.weights for unit in used), default=0)
    following = (first.weights + 2 * second.weights for first, second in pairwise(used))
    return rest.weights + max(rest.weights, 2 * largest, max(following, default=0) * scoring)


def gathered_gradients(used: list[Unit], rest: Unit, kept: float) -> float:
    """Return the peak of unsharded gradients in a backward pass, in bytes.

    Gradients of a unit are copied into a buffer for the reduce-scatter. Those in no unit stay until the end of the
    pass, when all activations are freed.

    Args:
        used: units that the pass calls.
        rest: parameters in no unit.
        kept: bytes of activations.
    """
    largest = max((unit.gradients for unit in used), default=0)
    return max(rest.gradients + 2 * largest, 2 * rest.gradients - kept)
