"""The official OpenVLA checkpoint layout: its configuration, action statistics and weights that are never read."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.config.policy import OpenVLAConfig, PrismaticConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.errors import CheckpointError
from reachrl.policies.lora.files import OFT_FOLDER, is_adapter
from reachrl.policies.openvla.names import TOWERS, canonical_key
from reachrl.policies.openvla.statistics import dataset_of, norm_stats, official_stats
from reachrl.policies.storage.families import other_family
from reachrl.policies.storage.saved import CONFIG_FILE
from reachrl.policies.storage.weights import read_json, read_shapes

PREPROCESSOR_FILE = "preprocessor_config.json"
# Attention heads cannot be read off the shapes of fused projections, so the released towers are listed.
KNOWN_HEADS = {"vit_large_patch14_reg4_dinov2.lvd142m": 16, "vit_so400m_patch14_siglip_224": 16}
# With these, blocks that are missing at the end of a file are noticed.
_KNOWN_DEPTHS = {"vit_large_patch14_reg4_dinov2.lvd142m": 24, "vit_so400m_patch14_siglip_224": 27}
_EMPTY_TOKEN_ID = 29871
_KINDS = ("openvla", "openvla_oft")  # ours that are stored alike
_RESIZES = ("resize-naive", "letterbox")


def is_official(folder: Path) -> bool:
    """Whether `folder` holds an official checkpoint rather than one of ours.

    Raises:
        CheckpointError: `config.json` is missing, damaged, of another model, or in Prismatic's own form, which states
            no sizes.
    """
    path = folder / CONFIG_FILE
    if not path.is_file() and is_adapter(folder / OFT_FOLDER):
        raise CheckpointError(
            f"{folder} holds no {CONFIG_FILE} but {OFT_FOLDER}, as OpenVLA-OFT's training leaves it: give "
            f"{folder / OFT_FOLDER}; what lies beside that folder is found"
        )
    raw = read_json(path)
    if "vla" in raw or isinstance(raw.get("model"), dict):
        raise CheckpointError(
            f"{path} is Prismatic's own, which does not state the model's sizes; put the official "
            'config.json ("model_type": "openvla") of the same model in its place. The weights may keep their names'
        )
    official = raw.get("model_type") == "openvla"
    if not official and raw.get("kind") not in _KINDS and (problem := other_family(raw, "openvla")) is not None:
        raise CheckpointError(f"{path}: {problem}")
    if not official and ("model_type" in raw or raw.get("kind") not in _KINDS):
        raise CheckpointError(
            f"{path}: model_type is {raw.get('model_type')!r}, expected 'openvla' (or a file written by "
            "ReachRL, which says kind='openvla'); give the folder of an OpenVLA checkpoint"
        )
    return official


def ties_embeddings(folder: Path) -> bool:
    """Whether the language model's head is its embedding, which safetensors then stores once.

    Only `text_config` counts: the official class asks its language model.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    text = read_json(folder / CONFIG_FILE).get("text_config")
    return isinstance(text, dict) and text.get("tie_word_embeddings") is True


def is_dead(key: str, config: PrismaticConfig) -> bool:
    """Whether an official weight is never read: a tower's last block, final norm or pooling."""
    for name, tower in zip(TOWERS, config.towers, strict=False):
        prefix = f"vision_backbone.{name}."
        if isinstance(tower, ViTTowerConfig) and key.startswith(prefix):
            return key.removeprefix(prefix).startswith((f"blocks.{tower.depth - 1}.", "norm.", "attn_pool."))
    return False


# --- the configuration -------------------------------------------------------------------------------------------


def official_config(
    folder: Path,
    tower_heads: Sequence[int] | None = None,
    dataset: str | None = None,
    *,
    section: type[PrismaticConfig] = OpenVLAConfig,
    given: Mapping[str, Any] | None = None,
) -> PrismaticConfig:
    """Describe an official checkpoint as a configuration of our class.

    Args:
        folder: with `config.json` and the weights.
        tower_heads: attention heads of each tower; only needed for towers other than the released ones.
        dataset: whose actions the number of action tokens is of.
        section: the class of the configuration.
        given: options of it that no file states.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not one we can build.
    """
    raw, shapes = read_json(folder / CONFIG_FILE), read_shapes(folder, canonical_key)
    ids = tower_names(folder)
    try:
        _refuse_what_we_would_ignore(raw, folder)
        language_model = _language_model(raw, shapes)
        return section.model_validate(
            {
                **(given or {}),
                "image_size": raw["image_sizes"][0],
                **_frames(raw, folder),
                "towers": _towers(ids, shapes, tower_heads, folder),
                "projector_expansion": max(shapes["projector.fc1.weight"][0] // shapes["projector.fc1.weight"][1], 1),
                "language_model": language_model,
                "tokenizer": "folder",
                "prompt_length": 32,
                "num_action_tokens": _num_action_tokens(folder, dataset),
                "value_hidden_size": max(language_model.hidden_size // 4, 1),
            }
        )
    except KeyError as error:
        raise CheckpointError(f"{folder} is no OpenVLA checkpoint we can build: it has no {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{folder} is no OpenVLA checkpoint we can build: {problems_of(error)}") from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no OpenVLA checkpoint we can build: {error!r}") from error


def problems_of(error: ValidationError) -> str:
    """What is wrong with a policy's configuration, in a line."""
    places = ((".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in error.errors())
    return "; ".join(f"{place}: {message}" if place else message for place, message in places)


def tower_names(folder: Path) -> list[str]:
    """What an official checkpoint calls its vision towers.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    ids = read_json(folder / CONFIG_FILE).get("timm_model_ids")
    if not isinstance(ids, list) or len(ids) not in (1, 2) or not all(isinstance(name, str) for name in ids):
        raise CheckpointError(f"{folder / CONFIG_FILE}: timm_model_ids = {ids!r}, expected one or two towers by name")
    return ids


def _refuse_what_we_would_ignore(raw: dict[str, Any], folder: Path) -> None:
    """Raise where the configuration asks for something that this package computes in one way only."""
    path, text = folder / CONFIG_FILE, raw.get("text_config") or {}
    activations = raw.get("timm_override_act_layers") or []
    if not isinstance(text, dict):
        raise CheckpointError(f"{path}: text_config is a {type(text).__name__}, expected an object")
    for name, found, expected in (
        ("n_action_bins", raw.get("n_action_bins", NUM_ACTION_BINS), NUM_ACTION_BINS),
        ("timm_override_act_layers", activations, [None] * len(activations)),
        ("text_config.model_type", text.get("model_type", "llama"), "llama"),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("text_config.rope_scaling", text.get("rope_scaling"), None),
        ("rope_type of text_config.rope_parameters", _rope(text).get("rope_type", "default"), "default"),
    ):
        if found != expected:
            raise CheckpointError(f"{path}: {name} = {found!r} is not supported, expected {expected!r}")
    sizes = raw.get("image_sizes")
    if not isinstance(sizes, list) or not sizes or any(size != sizes[0] for size in sizes):
        raise CheckpointError(f"{path}: image_sizes = {sizes!r}, expected a list of equal sizes, one for each tower")
    backbone = raw.get("llm_backbone_id", "llama2-7b-pure")
    if not str(backbone).endswith("-pure"):
        raise CheckpointError(
            f"{path}: llm_backbone_id = {backbone!r} is asked in the words of a conversation (as OpenVLA v0.1, with "
            "Vicuna's), which this package does not write; expected a model without such a template, as "
            "'llama2-7b-pure' of openvla-7b"
        )


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Where files of transformers 5 keep the rotary position embedding's numbers."""
    return text.get("rope_parameters") or {}


def _towers(
    ids: list[str], shapes: dict[str, tuple[int, ...]], heads: Sequence[int] | None, folder: Path
) -> list[ViTTowerConfig]:
    if heads is None:
        unknown = [name for name in ids if name not in KNOWN_HEADS]
        if unknown:
            raise CheckpointError(f"{folder}: unknown vision towers {unknown}; known are {sorted(KNOWN_HEADS)}")
        heads = [KNOWN_HEADS[name] for name in ids]
    if len(heads) != len(ids):
        raise CheckpointError(
            f"{folder} has {len(ids)} vision towers ({', '.join(ids)}), but {len(heads)} were described; "
            "expected one entry for each in policy.towers, or one number for each in --tower-heads"
        )
    places = zip(TOWERS, ids, heads, strict=False)
    return [_tower(place, shapes, number, _KNOWN_DEPTHS.get(name)) for place, name, number in places]


def _tower(name: str, shapes: dict[str, tuple[int, ...]], num_heads: int, depth: int | None) -> ViTTowerConfig:
    """Read one tower's sizes off the shapes of its weights; the depth too, where none is known."""
    prefix = f"vision_backbone.{name}."
    width, _, patch_size, _ = shapes[prefix + "patch_embed.proj.weight"]
    mlp_width = shapes[prefix + "blocks.0.mlp.fc1.weight"][0]
    blocks = {int(match[1]) for key in shapes if (match := re.match(re.escape(prefix) + r"blocks\.(\d+)\.", key))}
    return ViTTowerConfig(
        width=width,
        depth=max(blocks) + 1 if depth is None else depth,
        num_heads=num_heads,
        mlp_width=mlp_width,
        patch_size=patch_size,
        num_registers=shapes.get(prefix + "reg_token", (1, 0))[1],
        class_token=prefix + "cls_token" in shapes,
        layer_scale=prefix + "blocks.0.ls1.scale_factor" in shapes,
    )


def _language_model(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> LanguageModelConfig:
    """Read the language model's sizes; the configuration leaves out what equals Llama-2's defaults."""
    text, model = raw.get("text_config") or {}, "language_model.model."
    vocab_size, hidden_size = shapes[model + "embed_tokens.weight"]
    return LanguageModelConfig(
        vocab_size=text.get("vocab_size", vocab_size),
        pad_to_multiple_of=raw.get("pad_to_multiple_of", 64),
        hidden_size=hidden_size,
        intermediate_size=shapes[model + "layers.0.mlp.gate_proj.weight"][0],
        num_layers=text.get("num_hidden_layers", 32),
        num_heads=text.get("num_attention_heads", 32),
        num_kv_heads=text.get("num_key_value_heads") or None,
        max_positions=text.get("max_position_embeddings", 2048),
        rope_theta=text.get("rope_theta", _rope(text).get("rope_theta", 10000.0)),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        bos_token_id=text.get("bos_token_id", 1),
        pad_token_id=raw.get("pad_token_id", 32000),
        empty_token_id=_EMPTY_TOKEN_ID,
    )


def _num_action_tokens(folder: Path, dataset: str | None) -> int:
    """One for each dimension of an action; where sets differ and none of them was named, the release's."""
    name, names = dataset_of(folder, dataset), norm_stats(folder)
    # A set that is not here may lie beside adapters on these weights.
    sizes = {len(official_stats(folder, each).q01) for each in ([name] if name in names else names)}
    return sizes.pop() if len(sizes) == 1 else 7


# --- frames ------------------------------------------------------------------------------------------------------


def _frames(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How the checkpoint's frames were made: resized, and normalised where it does not leave that to the towers.

    The official code reads the preprocessor's file alone, so that is the one that counts.
    """
    path = folder / PREPROCESSOR_FILE
    saved = read_json(path) if path.is_file() else {}
    # Without an entry the official class assumes `letterbox`.
    resize = raw.get("image_resize_strategy", "letterbox")
    if "image_resize_strategy" in saved:
        resize = saved["image_resize_strategy"]
    else:
        path = folder / CONFIG_FILE
    if resize not in _RESIZES:
        raise CheckpointError(
            f"{path}: image_resize_strategy = {resize!r} is not supported, expected one of "
            f"{', '.join(_RESIZES)}; a checkpoint trained on other frames would see wrong pixels"
        )
    size = raw["image_sizes"][0]
    for name, expected in (("interpolations", "bicubic"), ("input_sizes", [3, size, size])):
        if any(found != expected for found in saved.get(name) or ()):
            raise CheckpointError(
                f"{folder / PREPROCESSOR_FILE}: {name} = {saved[name]!r} is not supported, expected {expected!r} for "
                "each tower"
            )
    return {"resize": resize, **(_pixel_statistics(saved, folder / PREPROCESSOR_FILE) if saved else {})}


def _pixel_statistics(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    if not {"means", "stds"} <= saved.keys():
        raise CheckpointError(
            f"{path} lacks `means` or `stds`, one entry for each tower, as the official checkpoints have them; "
            "without the right ones the policy would see wrong colours"
        )
    try:
        usable = all(math.isfinite(mean) for row in saved["means"] for mean in row) and all(
            0 < std < math.inf for row in saved["stds"] for std in row
        )
    except TypeError:
        usable = False
    if not usable:
        raise CheckpointError(
            f"{path}: means = {saved['means']!r} and stds = {saved['stds']!r} cannot normalise pixels; expected an RGB "
            "triple of numbers for each tower (OpenVLAConfig's image_mean and image_std), the stds above 0"
        )
    return {"image_mean": saved["means"], "image_std": saved["stds"]}
