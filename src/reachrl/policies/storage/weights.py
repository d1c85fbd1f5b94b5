"""Safetensors folders: check names and shapes against a module before anything is copied, then copy."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reachrl.allocator import return_freed_blocks
from reachrl.errors import CheckpointError
from reachrl.run.stored_weights import check_finite, indexed_files

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHOWN = 12
_LARGE = 2**30  # bytes of weights from which freed memory goes back at once
_PICKLES = ("*.pt", "pytorch_model*.bin", "checkpoints/*.pt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Entry of one tensor in a safetensors header."""

    key: str  # the name in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, ...

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder: one, or the shards of its index.

    Raises:
        CheckpointError: there are none, or the index names one that is missing or lies elsewhere.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(str(path.relative_to(folder)) for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"the weights in {folder} are pickles ({', '.join(pickles[:_SHOWN])}), which are never opened here: a "
                "pickle can run any code. Load them with the tool that wrote them and write the tensors to "
                f"{SINGLE_FILE} with safetensors.torch.save_file; their names may stay as they are"
            )
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; is it a checkpoint folder?")
    return indexed_files(folder / INDEX_FILE)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a checkpoint folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_header(path: Path) -> list[StoredTensor]:
    """Read the header of one file, in the order of its tensors.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            return [StoredTensor(name, tuple(entry.get_shape()), entry.get_dtype()) for name, entry in slices.items()]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {error}"
        ) from error


def read_headers(folder: Path, name_of: Callable[[str], str]) -> dict[str, StoredTensor]:
    """Read the headers of all files of a folder, by the tensors' names in the policy.

    Args:
        folder: with safetensors files.
        name_of: the policy's name of a weight by the name it is stored under.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, two tensors stand for one weight, or the
            index names a tensor that is in no shard.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for tensor in read_header(path):
            name = name_of(tensor.key)
            if name in tensors:
                raise CheckpointError(
                    f"{folder} holds the weight {name} twice: as {tensors[name].key} and, in {path.name}, as "
                    f"{tensor.key}. Remove one of them; a checkpoint needs each weight once"
                )
            tensors[name] = tensor
    if not (folder / SINGLE_FILE).is_file():
        listed = read_json(folder / INDEX_FILE)["weight_map"]
        if absent := [key for key in listed if name_of(key) not in tensors]:
            raise CheckpointError(
                f"{folder / INDEX_FILE} names weights that no shard holds: {', '.join(absent[:_SHOWN])}"
                f"{', ...' if len(absent) > _SHOWN else ''}; download or copy the shards again"
            )
    return tensors


def read_shapes(folder: Path, name_of: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all stored tensors from the headers, by their names in the policy.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or two tensors stand for one weight.
    """
    return {name: tensor.shape for name, tensor in read_headers(folder, name_of).items()}


def check_shapes(
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
    folder: Path,
    *,
    skipped: Callable[[str], bool] = lambda key: False,
    optional: Callable[[str], bool] = lambda key: False,
) -> None:
    """Check stored names and shapes against a module's.

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
            + f". {_remedy(problems['missing'])}"
        )


def _remedy(missing: list[str]) -> str:
    if len(missing) == 1 and missing[0].endswith("lm_head.weight"):
        return (
            "A head that is missing alone was tied to the embedding: if it was, set tie_word_embeddings to true in "
            "text_config of config.json"
        )
    return "Use the policy configuration the checkpoint was trained with"


@torch.no_grad()
def copy_weights(
    module: nn.Module,
    folder: Path,
    name_of: Callable[[str], str],
    take: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> None:
    """Copy every stored tensor that the module has, one at a time; check names and shapes first.

    Args:
        module: where to.
        folder: where from.
        name_of: the module's name of a weight by the name it is stored under.
        take: by name, what is given a tensor in place of copying it.

    Raises:
        CheckpointError: a weight holds numbers that are not finite, or integers.
    """
    files = weight_files(folder)
    if sum(path.stat().st_size for path in files) >= _LARGE:
        return_freed_blocks()
    takers = take or {}
    targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                known = name_of(name)
                target = targets.get(known)
                if known not in takers and target is None:
                    continue
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() and (
                    known in takers or (target is not None and target.is_floating_point())
                ):
                    raise CheckpointError(
                        f"{path}: the weight {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is "
                        "no number of its own but one of a quantised weight: give the checkpoint in 16 or 32 bits"
                    )
                check_finite(tensor, name, path)
                if known in takers:
                    takers[known](tensor)
                elif target is not None:
                    target.copy_(tensor)
