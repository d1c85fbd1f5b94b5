"""Provenance agrees with what git and the interpreter say themselves."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from reachrl.errors import StorageError
from reachrl.run import provenance


def test_facts_agree_with_their_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "provenance.json"
    record = provenance.write_provenance(path, seed=3, protocol_hash="p", config_hash="c")
    assert json.loads(path.read_text()) == record
    assert record["python"] == sys.version.split()[0]
    assert record["packages"]["numpy"] == version("numpy")
    assert (record["seed"], record["protocol_hash"], record["config_hash"]) == (3, "p", "c")
    assert record["cores"] >= 1 and record["memory_bytes"] > 2**28 and record["earlier"] == []
    first = {key: record[key] for key in ("started", "command", "commit", "dirty")}
    assert provenance.write_provenance(path, seed=3)["earlier"] == []  # the same command, resumed
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/reachrl", "train", "x"])
    for _ in range(2):
        other = provenance.write_provenance(path, seed=3)
        assert other["command"] == ["reachrl", "train", "x"] and other["earlier"] == [first]


@pytest.mark.parametrize("damaged", [b'{"started": ', b"\xff"])
def test_a_damaged_record_is_named_and_left_alone(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "provenance.json"
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match=r"provenance\.json is not JSON .* delete it to go on"):
        provenance.write_provenance(path, seed=3)
    assert path.read_bytes() == damaged


def test_commit_and_local_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit() == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "provenance.py").write_text("a = 1")
    assert provenance.commit() == {"commit": None, "dirty": None}  # somebody else's repository
    git("add", ".")
    git("commit", "-m", "x")
    assert provenance.commit() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "provenance.py").write_text("a = 2")
    assert provenance.commit()["dirty"] is True
