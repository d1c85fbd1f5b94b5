"""Merging of adapters into their weights, out of place and rounded once."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reachrl.errors import CheckpointError
from reachrl.policies.lora.deltas import deltas

_LEAST = 1e-3  # share of the weights that an adapter in use changes at least, also of weights in bfloat16


def folded(folder: Path, name: str, weight: Tensor, delta: tuple[Tensor, Tensor, float]) -> Tensor:
    """Merge as `merged` does, after checking that the adapter in `folder` fits the weight.

    Raises:
        CheckpointError: the two do not fit.
    """
    a, b, _ = delta
    ones = (1,) * (weight.ndim - 2)
    if weight.ndim < 2 or a.shape[1:] != weight.shape[1:] or b.shape != (weight.shape[0], a.shape[0], *ones):
        raise CheckpointError(
            f"{folder}: the adapter of {name}, {list(a.shape)} and {list(b.shape)}, does not fit the weight of its "
            f"base, {list(weight.shape)}; is it the right base?"
        )
    return merged(weight, *delta)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute `weight + scale * B A` in float32, rounded once to the weight's data type.

    Args:
        weight: [out, in] of a linear map, or [out, in, k, k] of a convolution.
        a: the inner matrix, [rank, in] or [rank, in, k, k].
        b: the outer matrix, [out, rank] or [out, rank, 1, 1].
        scale: alpha / rank.

    Source: Hu et al. 2021, LoRA, equation 3.
    """
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    delta = (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    return (weight.float() + scale * delta).to(weight.dtype)


class Effect:
    """Counts the weights that merging changes after rounding to their data type."""

    def __init__(self, folder: Path) -> None:
        """Start counting for the adapters in `folder`."""
        self._folder, self._weights, self._changed, self._trained = folder, 0, 0, False

    def count(self, before: Tensor, after: Tensor, delta: tuple[Tensor, Tensor, float]) -> None:
        """Count one weight, before and after merging."""
        self._weights += before.numel()
        self._changed += int(torch.count_nonzero(before != after))
        # Ours may be as they began: a run that has trained its critic alone.
        self._trained = self._trained or bool(delta[0].any() and delta[1].any())

    def check(self) -> None:
        """Refuse trained adapters that are lost entirely in rounding.

        Raises:
            CheckpointError: they change less than 1 weight in 1000.
        """
        if self._trained and self._changed < _LEAST * self._weights:
            raise CheckpointError(
                f"{self._folder}: its adapters change {self._changed:,} of the {self._weights:,} weights they are "
                "folded into; beside the others they are too small to count, so the base alone would act under their "
                "name. Compare r and lora_alpha in adapter_config.json with those of the training, or hold the weights "
                "in float32"
            )


@torch.no_grad()
def merge_into(
    policy: nn.Module, folder: Path, name_of: Callable[[str], str], *, skipped: Callable[[str], bool]
) -> None:
    """Merge the adapters in `folder` into a policy without adapters.

    Args:
        policy: holds the base's weights.
        folder: with a peft adapter.
        name_of: the policy's name of a weight by the name it is stored under.
        skipped: which weights the policy knowingly does not have.

    Raises:
        CheckpointError: an adapter belongs to no weight of the policy, does not fit it, or all of them change nothing.
    """
    weights, effect = dict(policy.named_parameters()), Effect(folder)
    for name, delta in deltas(folder, name_of).items():
        if name in weights:
            after = folded(folder, name, weights[name], delta)
            effect.count(weights[name], after, delta)
            weights[name].copy_(after)
        elif not skipped(name):
            raise CheckpointError(f"{folder}: the adapter of {name} fits no weight of its base; is it the right base?")
    effect.check()
