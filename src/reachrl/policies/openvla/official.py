"""The official OpenVLA checkpoint layout: its configuration, action statistics and weights that are never read."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reachrl.config.policy import LanguageModelConfig, OpenVLAConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.errors import CheckpointError
from reachrl.policies.action_tokens import ActionStats
from reachrl.policies.openvla import adapters
from reachrl.policies.openvla.weights import read_json, read_shapes

TOWERS = ("featurizer", "fused_featurizer")
# Attention heads cannot be read off the shapes of fused projections, so the released towers are listed.
KNOWN_HEADS = {"vit_large_patch14_reg4_dinov2.lvd142m": 16, "vit_so400m_patch14_siglip_224": 16}
_EMPTY_TOKEN_ID = 29871
_RESIZES = ("resize-naive", "letterbox")


def is_official(folder: Path) -> bool:
    """Whether `folder` holds an official checkpoint rather than one of ours.

    Raises:
        CheckpointError: `config.json` is missing, damaged or in Prismatic's own form, which states no sizes.
    """
    raw = read_json(folder / "config.json")
    if "vla" in raw or isinstance(raw.get("model"), dict):
        raise CheckpointError(
            f"{folder / 'config.json'} is Prismatic's own, which does not state the model's sizes; put the official "
            'config.json ("model_type": "openvla") of the same model in its place. The weights may keep their names'
        )
    return raw.get("model_type") == "openvla"


def is_dead(key: str, config: OpenVLAConfig) -> bool:
    """Whether an official weight is never read: a tower's last block, final norm or pooling."""
    for name, tower in zip(TOWERS, config.towers, strict=False):
        prefix = f"vision_backbone.{name}."
        if isinstance(tower, ViTTowerConfig) and key.startswith(prefix):
            return key.removeprefix(prefix).startswith((f"blocks.{tower.depth - 1}.", "norm.", "attn_pool."))
    return False


def _tower(name: str, shapes: dict[str, tuple[int, ...]], num_heads: int) -> ViTTowerConfig:
    """Read one tower's sizes off the shapes of its weights."""
    prefix = f"vision_backbone.{name}."
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    blocks = {int(match[1]) for key in own if (match := re.match(r"blocks\.(\d+)\.", key))}
    width, _, patch_size, _ = own["patch_embed.proj.weight"]
    return ViTTowerConfig(
        width=width,
        depth=max(blocks) + 1,
        num_heads=num_heads,
        mlp_width=own["blocks.0.mlp.fc1.weight"][0],
        patch_size=patch_size,
        num_registers=own.get("reg_token", (1, 0))[1],
        class_token="cls_token" in own,
        layer_scale="blocks.0.ls1.scale_factor" in own,
    )


def _language_model(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> LanguageModelConfig:
    """Read the language model's sizes; the configuration leaves out what equals Llama-2's defaults."""
    text = raw.get("text_config", {})
    model = "language_model.model."
    vocab_size, hidden_size = shapes[model + "embed_tokens.weight"]
    layers = {int(match[1]) for key in shapes if (match := re.match(re.escape(model) + r"layers\.(\d+)\.", key))}
    num_heads = text.get("num_attention_heads", 32)
    return LanguageModelConfig(
        vocab_size=vocab_size,
        pad_to_multiple_of=raw.get("pad_to_multiple_of", 64),
        hidden_size=hidden_size,
        intermediate_size=shapes[model + "layers.0.mlp.gate_proj.weight"][0],
        num_layers=len(layers),
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads") or None,
        max_positions=text.get("max_position_embeddings", 2048),
        rope_theta=text.get("rope_theta", 10000.0),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        bos_token_id=text.get("bos_token_id", 1),
        pad_token_id=raw.get("pad_token_id", 32000),
        empty_token_id=_EMPTY_TOKEN_ID,
    )


def official_config(folder: Path, tower_heads: Sequence[int] | None = None) -> OpenVLAConfig:
    """Describe an official checkpoint as a configuration of our class.

    Args:
        folder: with `config.json` and the weights.
        tower_heads: attention heads of each tower; only needed for towers other than the released ones.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not one we can build.
    """
    raw, shapes = read_json(folder / "config.json"), read_shapes(folder)
    ids = raw.get("timm_model_ids", [])
    # Without an entry the official class assumes `letterbox`.
    resize = raw.get("image_resize_strategy", "letterbox")
    if resize not in _RESIZES:
        raise CheckpointError(
            f"{folder / 'config.json'}: image_resize_strategy = {resize!r} is not supported, expected one of "
            f"{', '.join(_RESIZES)}; a checkpoint trained on other frames would see wrong pixels"
        )
    if tower_heads is None:
        unknown = [name for name in ids if name not in KNOWN_HEADS]
        if unknown:
            raise CheckpointError(f"{folder}: unknown vision towers {unknown}; known are {sorted(KNOWN_HEADS)}")
        tower_heads = [KNOWN_HEADS[name] for name in ids]
    try:
        towers = [_tower(name, shapes, heads) for name, heads in zip(TOWERS, tower_heads, strict=False)]
        language_model = _language_model(raw, shapes)
        return OpenVLAConfig.model_validate(
            {
                "image_size": raw["image_sizes"][0],
                "resize": resize,
                "towers": towers,
                "projector_expansion": max(shapes["projector.fc1.weight"][0] // shapes["projector.fc1.weight"][1], 1),
                "language_model": language_model,
                "tokenizer": "folder",
                "prompt_length": 32,
                "num_action_tokens": _num_action_tokens(raw),
                "value_hidden_size": max(language_model.hidden_size // 4, 1),
                **_pixel_statistics(folder),
            }
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{folder} is no OpenVLA checkpoint we can build: {error!r}") from error


def _pixel_statistics(folder: Path) -> dict[str, Any]:
    """What the checkpoint says its frames were normalised by; nothing where it leaves that to the towers."""
    preprocessor = folder / "preprocessor_config.json"
    saved = read_json(preprocessor) if preprocessor.is_file() else {}
    if not saved:
        return {}
    if not {"means", "stds"} <= saved.keys():
        raise CheckpointError(
            f"{preprocessor} lacks `means` or `stds`, one entry for each tower, as the official checkpoints have them; "
            "without the right ones the policy would see wrong colours"
        )
    return {"image_mean": saved["means"], "image_std": saved["stds"]}


def _num_action_tokens(raw: dict[str, Any]) -> int:
    sizes = {len(entry["action"]["q01"]) for entry in (raw.get("norm_stats") or {}).values()}
    return sizes.pop() if len(sizes) == 1 else 7


def norm_stats(folder: Path) -> dict[str, Any]:
    """All action statistics of a folder by dataset: its base's or its configuration's, and those beside it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if adapters.is_adapter(folder) and not (folder / "config.json").is_file():  # of another tool
        return norm_stats(adapters.base_of(folder)) | _own_stats(folder)
    return dict(read_json(folder / "config.json").get("norm_stats") or {}) | _own_stats(folder)


def _own_stats(folder: Path) -> dict[str, Any]:
    """What fine-tuned checkpoints carry beside the configuration."""
    path = folder / "dataset_statistics.json"
    return read_json(path) if path.is_file() else {}


def official_stats(folder: Path, dataset: str | None) -> ActionStats | None:
    """The action statistics of one dataset, or None when there are several and none was named.

    Without a name, those beside the configuration win: the folder was fine-tuned on them.

    Raises:
        CheckpointError: `dataset` is not among them, or its entry is damaged.
    """
    stats = norm_stats(folder)
    candidates = _own_stats(folder) or stats
    if dataset is None and len(candidates) != 1:
        return None
    name = dataset if dataset is not None else next(iter(candidates))
    if name not in stats:
        raise CheckpointError(f"{folder} has no action statistics named {name!r}; it has {sorted(stats)}")
    try:
        action = stats[name]["action"]
        return ActionStats.create(action["q01"], action["q99"], action.get("mask", [True] * len(action["q01"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the action statistics {name!r} of {folder} are damaged ({error!r}); expected `action` with `q01` and "
            "`q99`, finite numbers, one for each dimension"
        ) from error
