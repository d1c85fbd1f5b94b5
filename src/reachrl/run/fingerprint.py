"""A cheap fingerprint of weights, without reading all of them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from reachrl.errors import CheckpointError

_KIND = "2:"  # before what this version writes; earlier versions wrote digits alone
_PIECE = 1024  # bytes read at the beginning, in the middle and at the end of every tensor
_LONGEST_HEADER = 100_000_000  # the format's own limit
_EDGE = 1_000_000  # bytes that earlier versions read at both ends of a file


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of file names, sizes, headers and three samples of every tensor.

    Args:
        files: safetensors files, always in the same order.

    Raises:
        CheckpointError: one is missing, truncated or not a safetensors file.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode())
                for piece in _pieces(file):
                    digest.update(piece)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is missing, truncated or not a safetensors file ({error!r}); put the whole file back"
            ) from error
    return _KIND + digest.hexdigest()[:16]


def _pieces(file: BinaryIO) -> Iterable[bytes]:
    """The header, then the samples; layout: u64 length of the header, the header (JSON), the tensors."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = file.read(length)
    yield header
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        for place in (start, (start + end - _PIECE) // 2, end - _PIECE):
            file.seek(8 + length + max(start, place))
            yield file.read(min(_PIECE, end - start))


def is_of(stored: str, files: Iterable[Path]) -> bool:
    """Whether a stored fingerprint is that of these files; one by an earlier version says less and is taken as it is.

    Raises:
        CheckpointError: a file is missing, truncated or not a safetensors file.
    """
    files = list(files)
    return stored == (fingerprint(files) if stored.startswith(_KIND) else _by_earlier_versions(files))


def _by_earlier_versions(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size} ".encode() + file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read())
    return digest.hexdigest()[:16]
