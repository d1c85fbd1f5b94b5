"""Detects the family of policies of a folder's `config.json`, to refuse another family by name."""

import re
from collections.abc import Mapping
from typing import Any

from reachrl.registry import BUILTINS

# Heads that draw actions from a continuous flow or regress them: `type` of LeRobot, `model_type` of transformers.
_CONTINUOUS = {
    "pi0": "pi0",
    "pi05": "pi0.5",
    "smolvla": "SmolVLA",
    "groot": "GR00T",
    "gr00t": "GR00T",
    "xvla": "X-VLA",
    "wall_x": "WALL-X",
    "act": "ACT",
    "diffusion": "Diffusion Policy",
    "vqbet": "VQ-BeT",
    "multi_task_dit": "a diffusion transformer",
}
# Families that answer in tokens, by the kind that computes them here, if one does.
_TOKENS = {
    "pi0_fast": ("pi0-FAST", "pi0_fast"),
    "paligemma": ("PaliGemma (pi0-FAST, perhaps)", "pi0_fast"),
    "qwen2_5_vl": ("Qwen2.5-VL (NORA, StarVLA or VLA-0, perhaps)", "qwen_fast"),
    "qwen3_vl": ("Qwen3-VL (StarVLA, perhaps)", "qwen_fast"),
    "qwen3_5": ("Qwen3.5 (StarVLA, perhaps)", "qwen_fast"),
    "spatialvla": ("SpatialVLA", "spatialvla"),
    "openvla": ("OpenVLA", "openvla"),
}
_LAYOUT = {"openvla": ("openvla", "openvla_oft")}  # one layout, of two functions that no configuration tells apart
INSTEAD = (
    "Checkpoints with token probabilities are OpenVLA's (policy.kind=openvla) and OpenVLA-OFT's with the token head "
    "(policy.kind=openvla_oft), such as Haozhan72/Openvla-oft-SFT-libero10-traj1 or "
    "RLinf/RLinf-OpenVLAOFT-LIBERO-90-Base-Lora"
)


def other_family(raw: Mapping[str, Any], kind: str) -> str | None:
    """Return why a folder's configuration is not of `policy.kind=kind`, and what to do; None: no known reason.

    Args:
        raw: `config.json`, of whatever program.
        kind: the configured one.
    """
    if "model_type" not in raw and (own := raw.get("kind")) in BUILTINS["policies"] and own != kind:
        return f"it was written by ReachRL with policy.kind={own}, configured is {kind}: set policy.kind={own}"
    for key in ("type", "model_type"):
        name = str(raw.get(key) or "").lower()
        family = re.match(r"gr00t|groot", name)
        if title := _CONTINUOUS.get(family[0] if family else name):
            return (
                f"it is {title} by {key} = {raw[key]!r} in config.json, whose head draws actions from a continuous "
                "distribution without giving their probability: it has no token probabilities, which every algorithm "
                f"here takes a ratio of. {INSTEAD}"
            )
        if name in _TOKENS and kind not in _LAYOUT.get(name, (_TOKENS[name][1],)):
            title, own = _TOKENS[name]
            if own in BUILTINS["policies"]:
                return f"it is {title} by {key} = {raw[key]!r} in config.json: set policy.kind={own}"
            known = ", ".join(sorted(BUILTINS["policies"]))
            return (
                f"it is {title} by {key} = {raw[key]!r} in config.json, which no policy kind of this version computes; "
                f"there are {known}, and plug-ins"
            )
    return None
