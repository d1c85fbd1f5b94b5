"""Names of weights: which parts they are of, and how Prismatic's own ones become the official ones."""

import re

from reachrl.config.policy import PrismaticConfig
from reachrl.policies.lora import adapters as lora

VALUE = "value_head."
HEAD = "language_model.lm_head.weight"
LAYERS = "language_model.model.layers."
TOWERS = ("featurizer", "fused_featurizer")
TARGETS = {  # of adapters: how the names of linear maps end, by the parts that the configuration names
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "projector": ("projector.fc1", "projector.fc2", "projector.fc3"),
    "vision": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "patches": ("patch_embed.proj",),
    "head": ("lm_head",),
}
_PROJECTOR = {"0": "fc1", "2": "fc2", "4": "fc3"}
_PREFIXES = {
    "vision_backbone.dino_featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.siglip_featurizer.": "vision_backbone.fused_featurizer.",
    **{f"projector.projector.{place}.": f"projector.{layer}." for place, layer in _PROJECTOR.items()},
    **{f"projector.{place}.": f"projector.{layer}." for place, layer in _PROJECTOR.items()},
    "llm_backbone.llm.": "language_model.",
    "llm.": "language_model.",
}
# The official conversion renames LayerScale, because transformers rewrites names that contain `gamma`.
_LAYER_SCALE = re.compile(r"^(vision_backbone\..*\.ls[12])\.gamma$")


def canonical_key(key: str) -> str:
    """The official name of a weight that is stored under its official name or under Prismatic's.

    Args:
        key: a name in a safetensors file; any other name is returned unchanged.
    """
    for native, official in _PREFIXES.items():
        if key.startswith(native):
            key = official + key.removeprefix(native)
            break
    return _LAYER_SCALE.sub(r"\1.scale_factor", key)


def adapter_sets(config: PrismaticConfig) -> lora.Sets:
    """The peft configuration of each set of adapters, by name; empty for a policy without adapters."""
    return {} if config.lora is None else lora.adapter_sets(config.lora, TARGETS, critic=config.critic == "adapter")
