"""What OpenVLA-OFT's training leaves beside the weights: `NAME--N_checkpoint.pt`, read without running anything."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reachrl.errors import CheckpointError
from reachrl.run.stored_weights import check_finite

PROPRIO = "proprio_projector"
NEW_FILE = f"{PROPRIO}--0_checkpoint.pt"  # where no program has given it a number
_MOST_BYTES = 1 << 30  # of a file and of what is in it; the released projectors hold 0.07 GB
_PREFIX = "module."  # what DistributedDataParallel puts before every name


def find(folder: Path, name: str) -> Path | None:
    """The companion `name` of a folder, a `.pt` file; None where there is none.

    Raises:
        CheckpointError: there are several, as after training was stopped and went on.
    """
    found = sorted(folder.glob(f"{name}--*.pt"))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} files of one part: {', '.join(path.name for path in found)}. Keep the one "
            "that was saved with the weights"
        )
    return found[0] if found else None


def first(folders: Sequence[Path], name: str) -> Path | None:
    """The companion `name` in the first of `folders` that has one.

    Raises:
        CheckpointError: that folder holds several.
    """
    return next((path for folder in folders if (path := find(folder, name)) is not None), None)


def read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a file that `torch.save` wrote of a state dict: tensors by name, and nothing that could be run.

    Args:
        path: the file.
        expected: names, without `module.`, and shapes.

    Returns:
        The tensors by those names, as stored, each with storage of its own.

    Raises:
        CheckpointError: the file is missing, damaged or larger than such files are; it holds anything but numbers; or
            names or shapes are not the expected ones.
    """
    _check_size(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds other things than tensors, which are never made here: a pickle can run any code "
            f"({str(error).splitlines()[0]}). Write the state dict alone with torch.save"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}. Copy or download it again") from error
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in stored.items()
    ):
        raise CheckpointError(f"{path} holds a {type(stored).__name__} of something else, expected tensors by name")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    problems = [
        f"{name} is {_described(tensors.get(name))}, expected numbers {list(shape)}"
        for name, shape in expected.items()
        if not _is_plain(tensors.get(name), shape)
    ]
    if strange := sorted(tensors.keys() - expected.keys()):
        problems.append(f"{', '.join(strange[:6])} are unknown")
    if problems:
        raise CheckpointError(f"{path} does not fit this policy: {'; '.join(problems)}")
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _check_size(path: Path) -> None:
    """Refuse what would fill the memory before it is read: the archive may be compressed."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            inside = sum(entry.file_size for entry in archive.infolist())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated, or not an archive as torch.save writes since PyTorch 1.6: {error}"
        ) from error
    if max(size, inside) > _MOST_BYTES:
        raise CheckpointError(
            f"{path} holds {max(size, inside):,} bytes, expected at most {_MOST_BYTES:,}: a companion file has a few "
            "small matrices"
        )


def _is_plain(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    return (
        tensor is not None
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tuple(tensor.shape) == shape
    )


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
