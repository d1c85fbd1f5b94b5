"""Checks of weight files, own or foreign: plain file names in indices, finite numbers in tensors."""

import json
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from reachrl.errors import CheckpointError


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of weights names, each once, all of them in its own folder.

    Links are followed: the hub's cache consists of them.

    Args:
        index: such as `model.safetensors.index.json`.

    Raises:
        CheckpointError: it is damaged, names a file elsewhere, or names one that is missing.
    """
    try:
        places = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}): expected `weight_map` in a JSON object") from error
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: weight_map is damaged, expected a file's name for each weight")
    shards = sorted(set(places.values()))
    outside = [name for name in shards if PurePosixPath(name).name != name or "\\" in name or "\0" in name]
    if outside:
        raise CheckpointError(
            f"{index} names {outside[0]!r}; expected plain names of files beside it. Put all weights into one folder "
            "and name them so"
        )
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing or not shards:
        raise CheckpointError(f"{index} names shards that are missing: {missing or 'none named'}")
    return [index.parent / name for name in shards]


def safetensors_files(folder: Path) -> list[Path]:
    """Every safetensors file of a folder, by name; none is allowed.

    Raises:
        CheckpointError: an index names a file that is missing or lies elsewhere.
    """
    for index in folder.glob("*.index.json"):
        indexed_files(index)
    return sorted(folder.glob("*.safetensors"))


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Refuse weights with NaN or infinities: their policy would look like a bad one.

    Takes one pass over the tensor and no memory.

    Raises:
        CheckpointError: names tensor and file.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # Both ends are NaN where one number is.
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not (torch.isfinite(low) & torch.isfinite(high)):
        raise CheckpointError(
            f"{file}: the weight {name} holds numbers that are not finite (NaN or infinite), so nothing can be "
            "computed with it. The training that wrote it diverged, or the file is damaged: take an earlier checkpoint"
        )
