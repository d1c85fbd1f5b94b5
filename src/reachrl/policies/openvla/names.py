"""Names of weights: Prismatic's own ones are brought into the official form wherever names are read."""

import re

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
