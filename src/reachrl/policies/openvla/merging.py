"""Folding adapters into the weights they adapt, always out of place and rounded once."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reachrl.errors import CheckpointError
from reachrl.policies.openvla.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.weights import read_json

# Options of peft's LoRA under which the same two matrices would mean something else.
_FOREIGN = (
    *("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"),
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # others train beside a base that they changed first
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
_SHOWN = 6


def deltas(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """What the adapters in `folder` add, as (A, B, scale) for each weight they change, by its name.

    Raises:
        CheckpointError: files are missing or damaged, the adapters are of a kind that cannot be folded in, or a tensor
            is no part of a pair of the stated rank.
    """
    rank, scale = _rank_and_scale(folder / CONFIG_FILE)
    pairs = _pairs(folder / WEIGHTS_FILE, read_adapter(folder))
    odd = [
        f"{name} ({list(a.shape)} and {list(b.shape)})"
        for name, (a, b) in pairs.items()
        if min(a.ndim, b.ndim) < 2 or not a.shape[0] == b.shape[1] == rank
    ]
    if odd:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: the matrices A and B of {_some(odd)} are not of rank {rank}, which "
            f"{CONFIG_FILE} states as r; the scale would be wrong. Put the two files of one adapter together"
        )
    return {name: (a, b, scale) for name, (a, b) in pairs.items()}


def _pairs(path: Path, stored: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """All tensors of a file as (A, B), by the name of the weight they change; what is dropped would go unnoticed."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in stored.items():
        match = _MATRIX.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            strange.append(key)
        elif found.setdefault(canonical_key(f"{match[1]}.weight"), {}).setdefault(match[2], tensor) is not tensor:
            strange.append(f"{key} (a second time)")
    problems = [f"unknown tensors {_some(strange)}"] if strange else []
    lone = [name for name, pair in found.items() if len(pair) < 2]
    problems += [f"one matrix alone for {_some(lone)}"] if lone else []
    problems += [] if found else ["no LoRA matrices"]
    if problems:
        raise CheckpointError(
            f"{path} holds {'; '.join(problems)}. Expected are only pairs {PREFIX}NAME.lora_A.weight and "
            ".lora_B.weight, as peft's save_pretrained writes them; save the adapters anew, or merge "
            "them with the tool that made them"
        )
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _rank_and_scale(path: Path) -> tuple[int, float]:
    """What peft's configuration says of plain LoRA."""
    config = read_json(path)
    foreign = [key for key in _FOREIGN if config.get(key)]
    foreign += ["trained biases"] if config.get("bias", "none") != "none" else []
    init = config.get("init_lora_weights")
    foreign += [] if init in _INITS else [f"init_lora_weights={init!r}"]
    if config.get("peft_type") != "LORA" or foreign:
        raise CheckpointError(
            f"{path}: expected plain LoRA, found {config.get('peft_type')}"
            + (f" with {', '.join(foreign)}" if foreign else "")
            + "; merge it with the tool that made it"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{path}: r = {rank!r} and lora_alpha = {alpha!r}; expected a whole number above 0 and a number. Copy them "
            "from the run that trained the adapters"
        )
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


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
