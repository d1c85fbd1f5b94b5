"""Provenance agrees with what git and the interpreter say themselves."""

import hashlib
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


def test_stages_keep_the_source_that_ran_them_and_plugins_their_file(tmp_path: Path, monkeypatch) -> None:
    source = "class Mine: ...\n"
    (tmp_path / "my_reward_file.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_reward_file  # noqa: F401  # pyright: ignore[reportMissingImports]

    path = tmp_path / "provenance.json"
    plugins = {"reward.kind": "my_reward_file:Mine", "env.kind": "never_imported:Env"}
    trained = provenance.write_provenance(path, stage="train", seed=3, plugins=plugins)["stages"]["train"]
    monkeypatch.setattr(sys, "argv", ["reachrl", "report"])
    monkeypatch.setattr(provenance, "commit", lambda file=None: {"commit": "another", "dirty": True})
    monkeypatch.setattr(provenance, "package_versions", lambda: {"torch": "another"})
    record = provenance.write_provenance(path, stage="report", seed=3)
    assert (record["commit"], record["stages"]["report"]["commit"]) == ("another", "another")
    assert record["stages"]["train"] == trained and trained["commit"] != "another"
    assert provenance.write_provenance(path, seed=3)["stages"].keys() == {"train", "report"}  # it ran no stage
    unknown = {"name": "never_imported:Env", "file": None, "sha256": None, "commit": None, "dirty": None}
    digest = hashlib.sha256(source.encode()).hexdigest()
    file = str((tmp_path / "my_reward_file.py").resolve())
    known = {"name": "my_reward_file:Mine", "file": file, "sha256": digest, "commit": None, "dirty": None}
    assert trained["plugins"] == {"reward.kind": known, "env.kind": unknown}
