"""What an inspected folder holds, in words and tables for people."""

from dataclasses import replace
from pathlib import Path

from reachrl.config.towers import TowerConfig
from reachrl.policies.folders import Inspection, dtypes_in_words
from reachrl.policies.openvla.inspection import EXAMPLE, AdapterInfo, CheckpointInfo, prompt_of
from reachrl.policies.openvla.oft import unsupported

_LAYOUTS = {
    "official": "the official OpenVLA layout",
    "prismatic": "the official OpenVLA layout, weights under Prismatic's own names",
    "reachrl": "written by ReachRL",
}


def describe(found: CheckpointInfo | AdapterInfo) -> Inspection:
    """The same, for the command line to show."""
    return _adapter(found) if isinstance(found, AdapterInfo) else _whole(found)


def _adapter(found: AdapterInfo) -> Inspection:
    return Inspection(
        folder=found.folder,
        facts={
            "layout": "peft adapters (LoRA), no whole weights" + _oft(found.oft_signal),
            "base": found.base,
            "rank, alpha": f"{found.rank}, {found.alpha:g}",
            "adapted": ", ".join(found.targets),
            "weights": f"{found.num_weights:,}",
            "stored as": dtypes_in_words(found.dtypes),
        },
        base=base if (base := Path(found.base)).is_dir() else None,
    )


def _whole(found: CheckpointInfo) -> Inspection:
    config, sizes, size = found.config, _sizes(found), found.config.image_size
    dims = ", ".join(f"{name} ({dim})" for name, dim in found.action_dims.items())
    return Inspection(
        folder=found.folder,
        facts={
            "layout": _LAYOUTS[found.layout] + _oft(found.oft_signal),
            **({"kind": _kind(found)} if found.oft_signal is not None else {}),
            "image": f"{size} x {size} pixels ({config.resize}), {config.num_patches} patches",
            "stored as": dtypes_in_words(found.dtypes),
            "statistics": f"{dims} action dimensions" if dims else "none",
            "prompt": repr(prompt_of("{instruction}")),
            "example": repr(prompt_of(EXAMPLE)),
            "its tokens": "no tokenizer.json" if found.prompt_ids is None else " ".join(map(str, found.prompt_ids)),
        },
        parts=tuple(replace(part, sizes=sizes.get(part.name, "")) for part in found.parts),
        numbers={
            "weights that are read": found.num_live,
            f"cache of one row of {found.sequence_length} positions": found.num_cached,
        },
    )


def _sizes(found: CheckpointInfo) -> dict[str, str]:
    """What can be said about the sizes of each part."""
    config, llm = found.config, found.config.language_model
    sizes = {f"tower {i + 1}": _tower(tower, heads_known=found.heads_known) for i, tower in enumerate(config.towers)}
    for i, name in enumerate(found.tower_names):
        sizes[f"tower {i + 1}"] = f"{name}: {sizes[f'tower {i + 1}']}"
    sizes["language model"] = (
        f"Llama: width {llm.hidden_size}, {llm.num_layers} layers, {llm.num_heads} heads "
        f"({llm.num_kv_heads or llm.num_heads} for keys), MLP {llm.intermediate_size}, vocabulary {llm.vocab_size}, "
        f"action tokens {llm.vocab_end - 256}..{llm.vocab_end - 1}"
    )
    sizes["projector"] = f"{config.vision_width} to {llm.hidden_size}"
    return sizes


def _tower(tower: TowerConfig, *, heads_known: bool) -> str:
    if tower.kind == "conv":
        return "convolutions " + "-".join(str(stage.channels) for stage in tower.stages)
    heads = f"{tower.num_heads} heads" if heads_known else "heads unknown"
    tokens = ", class token" * tower.class_token + f", {tower.num_registers} registers" * bool(tower.num_registers)
    return (
        f"ViT: width {tower.width}, {tower.depth} blocks ({tower.depth - 1} read), {heads}, MLP {tower.mlp_width}, "
        f"patches of {tower.patch_size} pixels{tokens}"
    )


def _oft(signal: str | None) -> str:
    return "" if signal is None else f"; OpenVLA-OFT by {signal}: another function than plain OpenVLA's"


def _kind(found: CheckpointInfo) -> str:
    if (problem := unsupported(found.folder)) is not None:
        return f"none that can be trained: {problem}"
    return "policy.kind=openvla_oft, with policy.chunk_size, policy.dialect and what else no file states"
