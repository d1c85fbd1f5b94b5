"""Fingerprints: no tensor can be replaced unnoticed, and those of earlier versions still hold."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reachrl.errors import CheckpointError
from reachrl.run.fingerprint import fingerprint, is_of


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sizes = {"a": (1,), "b": (7,), "c": (900, 700), "d": (500, 400), "e": (900, 700), "f": (0, 3)}
    path = tmp_path / "model.safetensors"
    save_file({name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}, path)
    return path


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
def test_any_other_tensor_is_noticed(weights: Path, name: str) -> None:
    """`d` lies more than a megabyte from both ends of the file."""
    before, state = fingerprint([weights]), load_file(weights)
    assert is_of(before, [weights])
    save_file(state | {name: state[name] + 1}, weights)
    assert not is_of(before, [weights])
    save_file(state, weights)
    assert fingerprint([weights]) == before


def test_one_by_an_earlier_version_is_compared_as_it_was_made(weights: Path) -> None:
    data = weights.read_bytes()
    edges = f"{weights.name} {len(data)} ".encode() + data[:1_000_000] + data[-1_000_000:]
    stored = hashlib.sha256(edges).hexdigest()[:16]
    assert is_of(stored, [weights])
    assert not is_of("0" * 16, [weights])


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02" + b"\0" * 7 + b"[]", None])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing, truncated or not"):
        fingerprint([path])
