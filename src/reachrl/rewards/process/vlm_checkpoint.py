"""Reads the vision-language checkpoints that a reward model can start from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from reachrl.errors import CheckpointError, ConfigError
from reachrl.rewards.process.base import REMEDY
from reachrl.rewards.process.pretrained import read_part, read_weights
from reachrl.rewards.process.vlm_families import FAMILIES, VisionFamily
from reachrl.rewards.process.vlm_inputs import own_template
from reachrl.run.fingerprint import fingerprint, is_of
from reachrl.run.stored_weights import safetensors_files
from reachrl.tokenizer_state import forget_calls

SUPPORTED = "Qwen2-VL (qwen2_vl), Qwen2.5-VL (qwen2_5_vl) and SmolVLM (smolvlm, idefics3)"


@dataclass(frozen=True, slots=True)
class VLMCheckpoint:
    """A checkpoint as it was read; the tokenizer's `chat_template` is set whatever the folder held."""

    vlm: Any
    tokenizer: Any
    processor: Any
    family: type[VisionFamily]
    fingerprint: str


def read_checkpoint(weights: Path, words: Path, *, dtype: str | torch.dtype) -> VLMCheckpoint:
    """Read a checkpoint.

    Args:
        weights: folder with config.json and the safetensors files.
        words: folder with the files of the tokenizer and of the image processor.
        dtype: of the weights; `auto` as they are stored.

    Raises:
        ConfigError: it is of a family that is not supported.
        CheckpointError: a file is missing or damaged.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    config_file = weights / "config.json"
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{config_file} is missing or damaged ({error}); expected a checkpoint of {SUPPORTED}."
        ) from error
    if model_type not in FAMILIES:
        raise ConfigError(
            f"The checkpoint {weights} is a {model_type!r} model. A reward model of kind 'vlm' takes {SUPPORTED}; for "
            "another model with a score or class logits use kind 'transformers'."
        )
    family = FAMILIES[model_type]
    tokenizer: Any = read_part(AutoTokenizer.from_pretrained, words, trust_remote_code=False)
    forget_calls(tokenizer)
    tokenizer.chat_template = own_template(words) or tokenizer.chat_template or family.template
    return VLMCheckpoint(
        vlm=read_weights(AutoModelForImageTextToText, weights, dtype=dtype),
        tokenizer=tokenizer,
        processor=read_part(family.processor_class().from_pretrained, words, trust_remote_code=False),
        family=family,
        fingerprint=fingerprint(safetensors_files(weights)),
    )


def read_adapters(place: Path) -> LoraConfig:
    """What a saved reward model's adapters are: their size, their places and the checkpoint below them.

    Raises:
        CheckpointError: the file is missing or damaged, or names no checkpoint.
    """
    adapters = read_part(LoraConfig.from_pretrained, place)
    if not isinstance(adapters, LoraConfig) or not adapters.base_model_name_or_path:
        raise CheckpointError(f"{place / 'adapter_config.json'} describes no adapters on a named checkpoint. {REMEDY}")
    return adapters


def read_base(place: Path, adapters: LoraConfig, *, fitted_on: str) -> VLMCheckpoint:
    """The checkpoint below saved adapters, the very one they were fitted on.

    Args:
        place: folder of the adapters, of the tokenizer and of the image processor.
        adapters: names the checkpoint.
        fitted_on: its fingerprint.

    Raises:
        CheckpointError: it is not there, another one is, or a file is damaged.
    """
    below = Path(str(adapters.base_model_name_or_path))
    advice = f"if it has moved, write its place into base_model_name_or_path of {place / 'adapter_config.json'}"
    if not below.is_dir():
        raise CheckpointError(f"The checkpoint {below}, below the adapters in {place}, is not there; {advice}.")
    if not is_of(fitted_on, safetensors_files(below)):
        raise CheckpointError(
            f"The adapters in {place} were fitted on other weights than {below} holds now. Put that checkpoint back; "
            f"{advice}."
        )
    return read_checkpoint(below, place, dtype="auto")
