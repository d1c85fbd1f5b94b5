"""Adapters put on and merged by peft itself: what our own merge is compared with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from reachrl.errors import CheckpointError
from reachrl.policies.lora.adapters import ACTOR
from reachrl.policies.lora.deltas import matrices
from reachrl.policies.lora.files import CONFIG_FILE
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.storage.weights import read_json


def attach(policy: nn.Module, folder: Path, *, skipped: Callable[[str], bool]) -> None:
    """Let peft put the adapters in `folder`, ours or another tool's, beside the weights of their base.

    Args:
        policy: holds the base's weights.
        folder: with plain LoRA.
        skipped: which weights the policy knowingly does not have.

    Raises:
        CheckpointError: files are missing or damaged, or an adapter belongs to no weight of the policy.
    """
    raw = read_json(folder / CONFIG_FILE)
    state = {key: tensor for key, tensor in matrices(folder, canonical_key).items() if not skipped(key)}
    # What was adapted is read off the file: patterns of names mean other modules in another tool's model.
    targets = sorted({key.partition(".lora_")[0] for key in state})
    missing = [name for name in targets if name not in dict(policy.named_modules())]
    if missing:
        raise CheckpointError(f"{folder} adapts modules that its base does not have: {', '.join(missing[:6])}")
    rooted = bool(raw.get("use_rslora"))
    config = LoraConfig(r=raw["r"], lora_alpha=raw["lora_alpha"], use_rslora=rooted, target_modules=targets)
    inject_adapter_in_model(config, policy, ACTOR)
    set_peft_model_state_dict(policy, state, ACTOR)
    policy.train(policy.training)  # the new modules too


@torch.no_grad()
def fold(policy: nn.Module, kinds: Mapping[str, torch.dtype]) -> None:
    """Let peft fold attached adapters into the weights; then round each once.

    Args:
        policy: with adapters.
        kinds: the types that the weights are rounded to, by name.
    """
    for name, layer in policy.named_modules():
        if isinstance(layer, LoraLayer) and f"{name}.weight" in kinds:
            if not layer.merged:
                layer.merge()  # pyright: ignore[reportCallIssue]  (of the linear or convolutional kind)
            weight: Any = layer.get_base_layer().weight
            weight.copy_(weight.to(kinds[f"{name}.weight"]))
