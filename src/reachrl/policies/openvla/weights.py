"""Safetensors folders: check names and shapes against a module before anything is copied, then copy."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from reachrl.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHOWN = 12


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: one, or the shards its index names.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; is it a checkpoint folder?")
    shards = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise CheckpointError(f"{folder / INDEX_FILE} names shards that are missing: {missing or 'none named'}")
    return [folder / name for name in shards]


def read_json(path: Path) -> dict:
    """Read one JSON object.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a checkpoint folder?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all stored tensors, without reading the tensors.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {error}"
            ) from error
    return shapes


def check_shapes(
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
    folder: Path,
    *,
    skipped: Callable[[str], bool] = lambda key: False,
    optional: Callable[[str], bool] = lambda key: False,
) -> None:
    """Compare names and shapes.

    Args:
        expected: what the module has.
        stored: what the folder has.
        folder: named in the message.
        skipped: stored keys that are known and deliberately not read.
        optional: expected keys that may be absent.

    Raises:
        CheckpointError: listing missing and unexpected keys and differing shapes.
    """
    problems = {
        "missing": [key for key in expected if key not in stored and not optional(key)],
        "unexpected": [key for key in stored if key not in expected and not skipped(key)],
        "of another shape": [
            f"{key} (stored {list(stored[key])}, expected {list(shape)})"
            for key, shape in expected.items()
            if key in stored and stored[key] != shape
        ],
    }
    lines = [
        f"{len(keys)} {name}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for name, keys in problems.items()
        if keys
    ]
    if lines:
        raise CheckpointError(
            f"the weights in {folder} do not fit this policy's architecture; "
            + "; ".join(lines)
            + ". Use the policy configuration the checkpoint was trained with"
        )


@torch.no_grad()
def copy_weights(module: nn.Module, folder: Path) -> None:
    """Copy every stored tensor the module has, one at a time; names and shapes were checked before."""
    targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                if name in targets:
                    targets[name].copy_(file.get_tensor(name))
