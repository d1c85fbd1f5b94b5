"""A policy on disk: weights, configuration, tokenizer and action statistics, complete or absent."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reachrl.config.policy import OpenVLAConfig, ViTTowerConfig
from reachrl.errors import CheckpointError, StorageError
from reachrl.policies.action_tokens import ActionStats
from reachrl.policies.openvla.official import is_dead, is_official, official_config, official_stats
from reachrl.policies.openvla.tokenizer import PromptTokenizer
from reachrl.policies.openvla.weights import SINGLE_FILE, check_shapes, copy_weights, read_json, read_shapes

if TYPE_CHECKING:
    from reachrl.policies.openvla.policy import OpenVLAPolicy

CONFIG_FILE = "config.json"
STATS_FILE = "dataset_statistics.json"
TOKENIZER_FILE = "tokenizer.json"
_OUR_STATS = "reachrl"
# The critic is ours: an official checkpoint has none and its configuration does not mention it.
_NOT_OFFICIAL = {"critic", "value_hidden_size", "image_mean", "image_std", "num_action_tokens"}


def save(policy: "OpenVLAPolicy", folder: Path) -> None:
    """Write the policy aside and rename it into place; an earlier one in `folder` stays until then.

    Raises:
        StorageError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    stats = policy.action_stats
    action = {"q01": stats.q01.tolist(), "q99": stats.q99.tolist(), "mask": stats.mask.tolist()}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in policy.state_dict().items()}
        save_file(weights, aside / SINGLE_FILE, metadata={"format": "pt"})
        config = policy.config.model_copy(update={"checkpoint": None, "dataset": None})
        (aside / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (aside / STATS_FILE).write_text(json.dumps({_OUR_STATS: {"action": action}}, indent=2) + "\n", encoding="utf-8")
        if policy.tokenizer is not None:
            policy.tokenizer.save(aside / TOKENIZER_FILE)
        if folder.exists():
            folder.rename(replaced)
        aside.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"the policy could not be written to {folder}: {error}; free space and try again") from error


def read_config(folder: Path, tower_heads: Sequence[int] | None = None) -> OpenVLAConfig:
    """The configuration of a folder, official or ours, with `checkpoint` set to the folder itself.

    Raises:
        CheckpointError: a file is missing, damaged, or of a policy we cannot build.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"policy checkpoint {folder} does not exist or is not a folder")
    if is_official(folder):
        config = official_config(folder, tower_heads)
    else:
        try:
            config = OpenVLAConfig.model_validate(read_json(folder / CONFIG_FILE))
        except ValidationError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} describes no policy of this version: {error}") from error
    return config.model_copy(update={"checkpoint": folder})


def load_into(policy: "OpenVLAPolicy", folder: Path) -> None:
    """Fill a policy that was built without storage (on the meta device) from `folder`.

    Raises:
        CheckpointError: a file is missing or truncated, or the folder holds another architecture.
    """
    folder = Path(folder)
    config = policy.config
    heads = [tower.num_heads if isinstance(tower, ViTTowerConfig) else 1 for tower in config.towers]
    stored = read_config(folder, heads)
    official = is_official(folder)
    _compare(type(policy).architecture_of(stored), policy.architecture(), folder, _NOT_OFFICIAL if official else set())
    check_shapes(
        {key: tuple(value.shape) for key, value in policy.state_dict().items()},
        read_shapes(folder),
        folder,
        skipped=(lambda key: is_dead(key, config)) if official else (lambda key: False),
        optional=(lambda key: key.startswith(("value_head.", "critic."))) if official else (lambda key: False),
    )
    policy.to_empty(device="cpu")
    for module in policy.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.__init__(module.config)  # its frequencies are computed, not stored
    copy_weights(policy, folder)
    if official:
        policy.value_head.reset()
        policy.reset_critic()
        stats = official_stats(folder, config.dataset)
    else:
        stats = _read_stats(folder)
    if stats is not None:
        try:
            policy.set_action_stats(stats.q01, stats.q99, stats.mask)
        except ValueError as error:
            raise CheckpointError(f"the action statistics in {folder} do not fit: {error}") from error
    if policy.tokenizer is None and (folder / TOKENIZER_FILE).is_file():
        try:
            policy.tokenizer = PromptTokenizer.from_file(folder / TOKENIZER_FILE, config.language_model)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise CheckpointError(f"{folder / TOKENIZER_FILE} cannot be read: {error}") from error


def _read_stats(folder: Path) -> ActionStats:
    try:
        action = read_json(folder / STATS_FILE)[_OUR_STATS]["action"]
        return ActionStats.create(action["q01"], action["q99"], action["mask"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATS_FILE} holds no action statistics: {error!r}") from error


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {k: v for key, item in items for k, v in _flatten(item, f"{path}.{key}" if path else str(key)).items()}


def _compare(stored: dict[str, Any], expected: dict[str, Any], folder: Path, ignored: set[str]) -> None:
    """Compare two architectures field by field.

    Raises:
        CheckpointError: naming every field that differs.
    """
    have = _flatten({key: value for key, value in stored.items() if key not in ignored})
    want = _flatten({key: value for key, value in expected.items() if key not in ignored})
    different = [
        f"{key} (checkpoint {have.get(key)!r}, configured {want.get(key)!r})"
        for key in sorted(have.keys() | want.keys())
        if have.get(key) != want.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{folder} holds a policy of another architecture: {'; '.join(different[:12])}. "
            "Use the policy section the checkpoint was trained with"
        )
