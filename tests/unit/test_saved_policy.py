"""What a folder says of a policy is known, whole and once, before there is a policy."""

import json
from pathlib import Path

import numpy as np
import pytest
from official_folder import HEADS, write_official
from small_policy import adapted, foreign, unseal

from reachrl.functional.action_stats import ActionStats
from reachrl.policies.openvla import filling, storage
from reachrl.policies.openvla.policy import OpenVLAPolicy


def trained(base: Path, folder: Path) -> Path:
    policy = adapted(base, critic="adapter")
    policy.set_action_stats(np.full(4, -0.25), np.full(4, 0.75), np.ones(4, bool))
    policy.save_pretrained(folder)
    return folder


def q99(stats: ActionStats | tuple[str, ...]) -> float:
    assert isinstance(stats, ActionStats)
    return float(stats.q99[0])


def test_of_whole_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    saved = storage.read(Path(base.name))
    assert saved.folder == saved.whole == saved.config.checkpoint == Path(base.name)
    assert (saved.is_adapter, saved.ours, saved.origin) == (False, True, None)
    assert saved.base == base and saved.base.is_absolute()  # adapters on them outlive the working directory
    assert q99(saved.stats) == 0.5 and saved.tokenizer == Path(base.name) / "tokenizer.json"
    official = write_official(tmp_path / "official")
    saved = storage.read(official, tower_heads=HEADS)
    assert (saved.ours, saved.tokenizer, saved.origin, saved.base) == (False, None, official, official)
    assert saved.stats == ("tiny_a", "tiny_b")
    named = storage.read(official, tower_heads=HEADS, dataset="tiny_b")
    expected = json.loads((official / "config.json").read_text())["norm_stats"]["tiny_b"]["action"]["q99"][0]
    assert q99(named.stats) == expected


def test_of_adapters_and_their_base(base: Path, tmp_path: Path) -> None:
    saved = storage.read(trained(base, tmp_path / "trained"))
    assert (saved.is_adapter, saved.ours, saved.whole, saved.base) == (True, True, base, base)
    assert saved.config.lora is not None and saved.config.lora.rank == 3
    assert q99(saved.stats) == 0.75 and saved.tokenizer == tmp_path / "trained" / "tokenizer.json"
    saved = storage.read(foreign(base, tmp_path / "foreign"))
    assert (saved.is_adapter, saved.ours, saved.whole) == (True, False, base)
    assert saved.config.lora is None and q99(saved.stats) == 0.5 and saved.tokenizer == base / "tokenizer.json"
    official = write_official(tmp_path / "official")
    read_by = lambda folder: OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)  # noqa: E731
    on_official = foreign(official, tmp_path / "on official", read_by=read_by)
    assert storage.read(on_official, tower_heads=HEADS).origin == official


def test_each_folder_is_read_and_verified_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing 15 GB twice takes a minute, and what was read twice could differ."""
    folder = trained(base, tmp_path / "trained")
    verified, built = [], []
    for module in (storage, filling):
        monkeypatch.setattr(module, "verify_if_sealed", lambda folder: verified.append(folder))
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda *args, **options: (built.append("read"), read(*args, **options))[1])
    build = OpenVLAPolicy._build
    monkeypatch.setattr(OpenVLAPolicy, "_build", lambda self: (built.append("build"), build(self))[1])
    policy = OpenVLAPolicy.from_pretrained(folder)
    assert verified == [folder, base] and built == ["read", "build"]
    OpenVLAPolicy(policy.config)
    assert verified[2:] == [folder, base] and built[2:] == ["read", "build"]
    policy.restore(folder)
    assert verified[4:] == [folder] and built[4:] == ["read"]


def test_what_cannot_be_read_is_told_before_anything_is_built(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unseal(trained(base, tmp_path / "trained"))
    (folder / "dataset_statistics.json").write_text("{}")
    monkeypatch.setattr(OpenVLAPolicy, "_build", lambda self: pytest.fail("a policy was built"))
    with pytest.raises(storage.CheckpointError, match="holds no action statistics"):
        OpenVLAPolicy.from_pretrained(folder)
