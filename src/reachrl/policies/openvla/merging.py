"""Folding adapters into the weights they adapt, always out of place and rounded once."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reachrl.errors import CheckpointError
from reachrl.policies.openvla.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.weights import read_json


def deltas(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """What the adapters in `folder` add, as (A, B, scale) for each weight they change, by its name.

    Raises:
        CheckpointError: files are missing or damaged, or the adapters are of a kind that cannot be folded in.
    """
    config = read_json(folder / CONFIG_FILE)
    foreign = [key for key in ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or foreign or config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: expected plain LoRA, found {config.get('peft_type')} with "
            f"{', '.join(foreign) or 'trained biases'}; merge it with the tool that made it"
        )
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    stored = read_adapter(folder)
    found = {}
    for key in stored:
        if key.endswith(".lora_A.weight"):
            other = key.replace(".lora_A.", ".lora_B.")
            if other not in stored:
                raise CheckpointError(f"{folder / WEIGHTS_FILE} holds {key} but not {other}; it is damaged")
            name = canonical_key(key.removeprefix(PREFIX).replace(".lora_A.weight", ".weight"))
            found[name] = (stored[key], stored[other], config["lora_alpha"] / root)
    return found


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
    for name, (a, b, scale) in deltas(folder).items():
        if name not in weights and skipped(name):
            continue
        if name not in weights or weights[name].shape[0] != b.shape[0] or weights[name].shape[1] != a.shape[1]:
            raise CheckpointError(f"{folder}: the adapter of {name} fits no weight of its base; is it the right base?")
        weights[name].copy_(merged(weights[name], a, b, scale))
