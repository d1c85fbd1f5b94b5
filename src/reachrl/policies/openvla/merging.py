"""Folding adapters into the weights they adapt, always out of place and rounded once."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reachrl.errors import CheckpointError
from reachrl.policies.openvla.adapter_files import deltas


def folded(folder: Path, name: str, weight: Tensor, delta: tuple[Tensor, Tensor, float]) -> Tensor:
    """`merged`, for a weight that may not be the one the adapter in `folder` was made for.

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
    """`weight + scale * B A`, computed in float32 and rounded once to the weight's own type.

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


@torch.no_grad()
def merge_into(policy: nn.Module, folder: Path, *, skipped: Callable[[str], bool]) -> None:
    """Fold the adapters in `folder` into a policy without adapters.

    Args:
        policy: holds the base's weights.
        folder: with a peft adapter.
        skipped: which weights the policy knowingly does not have.

    Raises:
        CheckpointError: an adapter belongs to no weight of the policy, or does not fit it.
    """
    weights = dict(policy.named_parameters())
    for name, delta in deltas(folder).items():
        if name in weights:
            weights[name].copy_(folded(folder, name, weights[name], delta))
        elif not skipped(name):
            raise CheckpointError(f"{folder}: the adapter of {name} fits no weight of its base; is it the right base?")
