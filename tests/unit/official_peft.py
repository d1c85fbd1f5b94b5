"""Adapters as peft writes them for the official class: on modules that are built from its own list of weights."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

EMBEDDING = "language_model.model.embed_tokens.weight"
_SUFFIXES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What peft 0.11, which OpenVLA and OpenVLA-OFT pin, wrote for `all-linear`: the last words of all names, the head among
# them. As patterns they fit the embedding of patches too, a convolution.
ALL_OF_0_11 = (*_SUFFIXES, "fc1", "fc2", "fc3", "qkv", "proj", "lm_head")


class OfficialClass(PreTrainedModel):
    """The official model as far as peft looks: its modules by name, weights of a checkpoint in them."""

    config_class = PretrainedConfig

    def __init__(self, base: Path) -> None:
        super().__init__(PretrainedConfig())
        self.name_or_path = str(base)
        state = load_file(base / "model.safetensors")
        for key, tensor in state.items():
            *parents, module, leaf = key.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in dict(owner.named_children()):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            bias = f"{key.removesuffix('weight')}bias" in state
            if key == EMBEDDING:
                owner.add_module(module, nn.Embedding(*tensor.shape))
            elif leaf == "weight" and tensor.ndim == 4:
                owner.add_module(module, nn.Conv2d(3, len(tensor), tensor.shape[-1], tensor.shape[-1], bias=bias))
            elif leaf == "weight" and tensor.ndim == 2:
                owner.add_module(module, nn.Linear(*reversed(tensor.shape), bias=bias))
            elif leaf != "bias" or f"{key.removesuffix('bias')}weight" not in state or tensor.ndim > 1:
                if module not in dict(owner.named_children()):
                    owner.add_module(module, nn.Module())
                owner.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor))
        for key in state.keys() - self.state_dict().keys():  # of normalisations
            self.get_submodule(key.rpartition(".")[0]).register_parameter("bias", nn.Parameter(state[key]))
        self.load_state_dict(state)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(EMBEDDING.removesuffix(".weight"))

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("language_model.lm_head")


def write_adapters(base: Path, folder: Path, *, targets: object = "all-linear", **options: object) -> Path:
    """Let peft put adapters on the official modules and save them, after a training that moved every matrix."""
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, **options})  # pyright: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(OfficialClass(base), config)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.3 if ".lora_A" in name else 0.1)
        model.save_pretrained(str(folder))
    return folder
