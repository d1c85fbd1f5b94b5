"""Checkpoint folders of tiny, random vision-language models in the Hugging Face layout, tokenizer and all."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

QWEN_MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SMOL_MARKS = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
WORDS = ("Ġyes", "Ġno", "yes", "no")  # of one token each, with and without a space before them
KINDS = ("qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3")


def tokenizer(marks: list[str]) -> PreTrainedTokenizerFast:
    """Bytes, digits apart from all else, a few words, and the model's own marks."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=marks, pad_token=marks[0])


def config(kind: str, words: PreTrainedTokenizerFast):
    """A configuration of some ten thousand weights."""
    text = {
        "vocab_size": len(words) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,  # wide, so that no two answers are alike
    }
    if kind.startswith("qwen"):
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.2}
        vision |= (
            {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
            if kind == "qwen2_vl"
            else {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "fullatt_block_indexes": [1]}
        )
        ids = {f"{name}_token_id": f"<|{mark}|>" for name, mark in (("image", "image_pad"), ("video", "video_pad"))}
        ids |= {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
        options = {key: words.convert_tokens_to_ids(mark) for key, mark in ids.items()}
        family = Qwen2VLConfig if kind == "qwen2_vl" else Qwen2_5_VLConfig
        return family(text_config=text, vision_config=vision, tie_word_embeddings=kind == "qwen2_vl", **options)
    text |= {"model_type": "llama", "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 48, "patch_size": 8, "initializer_range": 0.2}
    family = SmolVLMConfig if kind == "smolvlm" else Idefics3Config
    image = words.convert_tokens_to_ids("<image>")
    return family(text_config=text, vision_config=vision, scale_factor=3, image_token_id=image)


def write_checkpoint(folder: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights, a tokenizer without a chat template, and an image processor; returns `folder`."""
    words = tokenizer(QWEN_MARKS if kind.startswith("qwen") else SMOL_MARKS)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config(kind, words))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil() if kind.startswith("qwen") else SmolVLMImageProcessorPil()
    processor.save_pretrained(folder)
    return folder
