"""LoRA adapters on a frozen base, added by peft; the actor and the critic may have separate sets.

peft is imported by a policy that has adapters, and by no other: it brings bitsandbytes along where that is installed,
and both together take more than a second.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from reachrl.config.language_model import LoRAConfig
from reachrl.errors import ConfigError
from reachrl.policies.llama import Contexts

if TYPE_CHECKING:
    import peft
    import peft.tuners.lora

_ACTORS = ("vision", "patches", "head")  # parts that no critic has of its own
ACTOR, CRITIC = "default", "critic"  # peft's names of the two sets
PREFIX = "base_model.model."
Sets = Mapping[str, "peft.LoraConfig"]  # peft's configuration of each set, by name


def adapter_sets(
    config: LoRAConfig, targets: Mapping[str, Sequence[str]], *, critic: bool
) -> "dict[str, peft.LoraConfig]":
    """The peft configuration of the actor's adapters and, if there is one, of the critic's set.

    Args:
        config: sizes and parts.
        targets: by part, how the names of its linear maps end in the policy's family.
        critic: whether there is a second set. It leaves out the towers and the head, which belong to the actor.
    """
    from peft import LoraConfig

    parts = {ACTOR: config.parts}
    if critic:
        parts[CRITIC] = tuple(part for part in config.parts if part not in _ACTORS)
    return {
        name: LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (peft divides it; a fraction is fine)
            lora_dropout=config.dropout,
            target_modules=[target for part in its for target in targets[part]],
            bias="none",
        )
        for name, its in parts.items()
    }


def check_parts(policy: nn.Module, config: LoRAConfig, targets: Mapping[str, Sequence[str]]) -> None:
    """Check that the policy has the adapted parts.

    Raises:
        ConfigError: a part of the policy has no linear map to adapt.
    """
    for part in config.parts:
        if not any(name.endswith(tuple(targets[part])) for name, _ in policy.named_modules()):
            raise ConfigError(f"policy.lora.parts: {part!r} has no linear maps to adapt in this policy; leave it out")


def add_adapters(policy: nn.Module, sets: Sets, *, trained: tuple[str, ...], four_bit: bool) -> None:
    """Freeze `policy` and add trainable float32 adapters to its linear layers; their product is zero at first.

    Args:
        policy: whose weights become the frozen base.
        sets: from `adapter_sets`; the actor's is active afterwards.
        trained: beginnings of the names of parameters that are trained whole, such as `value_head.`.
        four_bit: whether linear maps are held in 4 bits.
    """
    from peft import inject_adapter_in_model

    policy.requires_grad_(False)
    policy.is_loaded_in_4bit = four_bit  # pyright: ignore  (peft asks: its class for 4-bit maps)
    with warnings.catch_warnings():  # peft wonders at a second set
        warnings.simplefilter("ignore")
        for name, described in sets.items():
            inject_adapter_in_model(described, policy, name)
    for name, parameter in policy.named_parameters():
        adapts = ".lora_" in name
        parameter.requires_grad_(adapts or name.startswith(trained))
        if adapts:
            parameter.data = parameter.data.float()
    for layer in _layers(policy):
        layer._active_adapter = [ACTOR]
    policy.train(policy.training)  # the new modules too: dropout must not act in a policy that is not being trained


def is_adapted(module: Any) -> "TypeGuard[peft.tuners.lora.LoraLayer]":
    """Whether a module is a linear map with adapters beside it; there is none before peft is imported."""
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and isinstance(module, lora.LoraLayer)


def _layers(policy: nn.Module) -> "list[peft.tuners.lora.LoraLayer]":
    return [module for module in policy.modules() if is_adapted(module)]


def active(policy: nn.Module, adapter: str) -> AbstractContextManager:
    """Activate the adapters named `adapter` within the context."""
    return _active(_layers(policy), adapter)


@contextmanager
def _active(layers: "list[peft.tuners.lora.LoraLayer]", adapter: str) -> Iterator[None]:
    # Not peft's `set_adapter`: that would also say which of them may be trained.
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer._active_adapter = name


def recomputing(policy: nn.Module) -> Contexts:
    """Return a `context_fn` for checkpointing: the recomputation uses the adapters that are active now."""
    layers = _layers(policy)
    adapter = layers[0]._active_adapter[0] if layers else ACTOR
    return lambda: (nullcontext(), _active(layers, adapter))


def rows_of(linear: nn.Module, first: int, number: int) -> Tensor:
    """Rows of the weight of a linear map; of one with adapters in float32, with what the active ones add to them."""
    weight: Tensor = cast(Any, linear).weight[first : first + number]
    if not is_adapted(linear) or linear.merged or (name := linear._active_adapter[0]) not in linear.lora_A:
        return weight
    a, b = cast(Any, linear.lora_A[name]).weight, cast(Any, linear.lora_B[name]).weight[first : first + number]
    with torch.autocast(weight.device.type, enabled=False):
        return weight.float() + linear.scaling[name] * (b @ a)


def parameters(policy: nn.Module, adapter: str, prefixes: tuple[str, ...]) -> list[nn.Parameter]:
    """Return the matrices of one set in the modules whose names begin with one of `prefixes`."""
    return [p for name, p in policy.named_parameters() if f".{adapter}." in name and name.startswith(prefixes)]


def tensors(policy: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the matrices of one set, named as in peft's files."""
    return {
        PREFIX + name.replace(f".{adapter}.", "."): parameter.detach()
        for name, parameter in policy.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }


@torch.no_grad()
def copy_set(policy: nn.Module, source: str, target: str) -> None:
    """Copy the matrices of the set `source` to `target`."""
    origin = tensors(policy, source)
    for key, tensor in tensors(policy, target).items():
        tensor.copy_(origin[key])
