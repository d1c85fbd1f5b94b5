"""A policy as vLLM reads it: a folder that describes it, and its weights, adapters folded in, under official names."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from reachrl.config.policy import OpenVLAConfig
from reachrl.policies.decoding.rollout_copy import acting_weight
from reachrl.policies.lora.adapters import CRITIC
from reachrl.policies.openvla.official import KNOWN_HEADS

if TYPE_CHECKING:
    from reachrl.policies.openvla.policy import OpenVLAPolicy

# vLLM fuses maps that read the same input and rebuilds what a reload touches, so what is sent is sent whole.
PARTS = ("vision_backbone", "projector", "language_model")


def write_description(config: OpenVLAConfig, folder: Path) -> None:
    """Write what vLLM reads before it has weights: `config.json` and a tokenizer that knows BOS alone.

    Prompts come as ids, so nothing is ever tokenised there; the image goes behind BOS.
    """
    llm = config.language_model
    text = {
        "model_type": "llama",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads or llm.num_heads,
        "max_position_embeddings": llm.max_positions,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},
        "bos_token_id": llm.bos_token_id,
        "pad_token_id": llm.pad_token_id,
        "tie_word_embeddings": False,
    }
    described = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "timm_model_ids": list(KNOWN_HEADS),
        "timm_override_act_layers": [None] * len(config.towers),
        "image_sizes": [config.image_size] * len(config.towers),
        "use_fused_vision_backbone": True,
        "image_token_index": llm.pad_token_id,
        "text_config": text,
    }
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}
    for name, content in (("config", described), ("tokenizer_config", special)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    vocabulary = {"<s>": llm.bos_token_id, "<unk>": llm.bos_token_id + 1}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def versions(policy: "OpenVLAPolicy") -> dict[str, tuple[int, ...]]:
    """How often each tensor of each part was written to; the critic's adapters do not act.

    What escapes PyTorch's count is said at `RolloutCopy.update`.
    """
    return {
        part: tuple(
            p._version for name, p in getattr(policy, part).named_parameters() if f".{CRITIC}." not in f".{name}"
        )
        for part in PARTS
    }


def tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Weights as they act, by their official names; those of one layer follow one another.

    Args:
        module: part of the policy.
        prefix: its name with a dot at the end.
    """
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        if isinstance(child, LoraLayer):
            weight, bias = acting_weight(child)  # pyright: ignore[reportArgumentType]
            yield f"{prefix}{name}.weight", weight
            if bias is not None:
                yield f"{prefix}{name}.bias", bias
        else:
            yield from tensors(child, f"{prefix}{name}.")


@torch.no_grad()
def write_weights(
    policy: "OpenVLAPolicy",
    parts: tuple[str, ...],
    folder: Path,
    sent: Callable[[Path], object],
    file_bytes: int,
) -> int:
    """Write parts of a policy into files of about `file_bytes`, one at a time.

    Args:
        policy: the acting one.
        parts: of `PARTS`.
        folder: for the files.
        sent: called with each file, and removes it.
        file_bytes: a larger tensor has a file alone.

    Returns:
        How many bytes went.
    """
    waiting: dict[str, Tensor] = {}
    size = total = number = 0

    def close() -> None:
        nonlocal waiting, size, number
        if waiting:
            path = folder / f"weights-{number}.safetensors"
            save_file(waiting, path)
            sent(path)
            waiting, size, number = {}, 0, number + 1

    for part in parts:
        for name, tensor in tensors(getattr(policy, part), f"{part}."):
            raw = tensor.detach().to("cpu", policy.compute_dtype).contiguous()
            if size + raw.nbytes > file_bytes:
                close()
            waiting[name] = raw
            size, total = size + raw.nbytes, total + raw.nbytes
    close()
    return total
