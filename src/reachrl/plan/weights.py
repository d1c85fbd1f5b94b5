"""Parameters of a policy by part, and who trains them; what sharded learners gather of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from reachrl.policies.base import Policy


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one part."""

    name: str
    count: int
    bytes: int
    """Memory of the parameters themselves; 4-bit ones with their scales."""
    trained_by: str | None
    """`policy` or `value`, the optimiser's two groups; none is frozen."""

    @property
    def width(self) -> float:
        """Bytes of one parameter."""
        return self.bytes / self.count


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes of weights that are gathered together, and of their gradients."""

    weights: int
    gradients: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> "Unit":
        """The unit of `parameters`."""
        sizes = [(parameter.nbytes, parameter.requires_grad) for parameter in parameters]
        return cls(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def weights(policy: Policy) -> tuple[Weights, ...]:
    """Everything `policy` holds, by module, type and who trains it; whatever takes no gradient is frozen."""
    value = {id(parameter) for parameter in policy.parameter_groups()["value"]}
    found: dict[tuple[str, float, str | None], tuple[int, int]] = {}
    for name, parameter in policy.named_parameters():
        part = name.split(".")[0].replace("_", " ")
        role = ("value" if id(parameter) in value else "policy") if parameter.requires_grad else None
        count, size = _size(parameter)
        key = (f"adapters of the {part}" if ".lora_" in name else part, size / count, role)
        if size < count:  # each map has its own scales
            key = (f"{part}, 4 bits", 0, role)
        before = found.get(key, (0, 0))
        found[key] = (before[0] + count, before[1] + size)
    return tuple(Weights(name, *sizes, role) for (name, _, role), sizes in found.items())


def _size(parameter: nn.Parameter) -> tuple[int, int]:
    """Numbers and bytes of a parameter, of a 4-bit one those that it stands for and those of its scales too."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel(), parameter.nbytes
    return math.prod(state.shape), parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def units(policy: Policy) -> tuple[list[Unit], Unit]:
    """What sharded learners gather one at a time, in the order of `sharding_units`, and what is in none of them."""
    modules = policy.sharding_units()
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    rest = Unit.of(parameter for parameter in policy.parameters() if id(parameter) not in inside)
    return [Unit.of(module.parameters()) for module in modules], rest


def gathered_weights(used: list[Unit], rest: Unit, *, scoring: bool) -> int:
    """Bytes gathered at the widest moment of a pass: what is in no unit, and beside it the largest unit twice.

    Pieces arrive in a buffer, from which the weights are copied; in the backward pass the next unit's buffer is filled
    while a unit computes. In the forward pass, the widest of scoring, a unit's buffer is kept until the next one's
    weights are copied.
    """
    largest = max((unit.weights for unit in used), default=0)
    following = (first.weights + 2 * second.weights for first, second in pairwise(used))
    return rest.weights + max(rest.weights, 2 * largest, max(following, default=0) * scoring)


def gathered_gradients(used: list[Unit], rest: Unit, kept: float) -> float:
    """Bytes of gradients that are not in pieces yet, at the widest moment of a backward pass.

    A unit's are copied into a buffer to be summed over the learners. Those in no unit stay to the end of the pass, when
    no activations are left.

    Args:
        used: units of the pass.
        rest: what is in none.
        kept: bytes of activations.
    """
    largest = max((unit.gradients for unit in used), default=0)
    return max(rest.gradients + 2 * largest, 2 * rest.gradients - kept)
