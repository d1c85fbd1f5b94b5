"""A checkpoint is complete or absent, and a damaged one names its damaged file."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reachrl.errors import CheckpointError
from reachrl.run.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint, verify_checkpoint
from reachrl.run.directory import Run
from reachrl.training_checkpoint import restore


def fill(content: bytes):
    def write(folder: Path) -> None:
        (folder / "weights").mkdir()
        (folder / "weights" / "policy.safetensors").write_bytes(content)
        (folder / "state.json").write_text("{}")

    return write


def test_latest_keeps_k_and_verifies(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 200_000, 1_000_000):
        path = save_checkpoint(tmp_path, step, fill(b"x" * step), keep=3)
        assert latest_checkpoint(tmp_path) == path
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000010", "step_200000", "step_1000000"]
    assert verify_checkpoint(path)["step"] == 1_000_000


def test_the_one_just_written_stays_even_among_later_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 20, fill(b"a"), keep=1)
    save_checkpoint(tmp_path, 10, fill(b"b"), keep=1)  # someone went back
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000010"]
    save_checkpoint(tmp_path, 10, fill(b"c"), keep=1)  # written again
    assert (latest_checkpoint(tmp_path) / "weights" / "policy.safetensors").read_bytes() == b"c"  # type: ignore[operator]
    verify_checkpoint(tmp_path / "step_000010")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "SHA-256"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "99 bytes where 100"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, words: str) -> None:
    save_checkpoint(tmp_path, 1, fill(b"x" * 100))
    path = save_checkpoint(tmp_path, 2, fill(b"y" * 100))
    damage(path / "weights" / "policy.safetensors")
    with pytest.raises(CheckpointError, match=rf"weights/policy\.safetensors .*{words}.*step_000001"):
        verify_checkpoint(path)
    verify_checkpoint(tmp_path / "step_000001")


def test_missing_or_broken_manifest(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, fill(b"x"))
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify_checkpoint(tmp_path / "step_000005")


def test_kill_while_filling_leaves_the_earlier_one_and_is_cleaned_up(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, fill(b"x"))
    code = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from reachrl.run.checkpoint import save_checkpoint
def fill(folder):
    (folder / "w").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(Path(sys.argv[1]), 2, fill)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
    verify_checkpoint(tmp_path / "step_000001")
    save_checkpoint(tmp_path, 3, fill(b"z"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000003"]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"train": {"iteration": 3}, "reward": {"highest": [0.5]}}, None),
        ({"train": {"iteration": 3}, "reward": {}}, "reward"),
        ({"train": {"iteration": 3, "lanes": 4}, "reward": {"highest": [0.5]}}, "counters"),
        ({"train": {"iteration": 3}}, "reward"),
    ],
)
def test_the_state_of_another_version_is_refused_by_the_name_of_its_part(content, name, tmp_path: Path) -> None:
    taken = []

    class Reward:
        def load_state_dict(self, state):
            taken.append(state["highest"])

    learner = SimpleNamespace(load=lambda folder, version: None)
    parts = {"reward": Reward(), "validation": SimpleNamespace(resume=lambda: None)}
    with Run.open(tmp_path / "run", {}) as run:
        saved = save_checkpoint(
            run.checkpoints, 3, lambda folder: (folder / "state.json").write_text(json.dumps(content)) and None, keep=1
        )
        if name is None:
            assert restore(run, learner, parts).iteration == 3 and taken == [[0.5]]
            return
        with pytest.raises(CheckpointError, match=f"the state of the {name} is that of another version") as refused:
            restore(run, learner, parts)
        assert f"--from {saved} " in str(refused.value) and str(run.provenance) in str(refused.value)
