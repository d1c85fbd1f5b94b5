"""Exported policies: peft's files alone, or merged in the base's layout and refused when they disagree."""

import json
from pathlib import Path

import numpy as np
import official_folder
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_policy import adapted, foreign, scores, unseal
from typer.testing import CliRunner

from reachrl.cli.app import app
from reachrl.config.language_model import LoRAConfig
from reachrl.errors import CheckpointError, ConfigError, StorageError
from reachrl.policies.lora import export as lora_export
from reachrl.policies.openvla import export, statistics
from reachrl.policies.openvla import official as official_module
from reachrl.policies.openvla.policy import OpenVLAPolicy

Deltas = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


def stored_as(dtype: torch.dtype, base: Path, folder: Path) -> Path:
    """`base`, with the policy's weights in another type."""
    OpenVLAPolicy.from_pretrained(base).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state = {key: value if key.startswith("value_head") else value.to(dtype) for key, value in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return unseal(folder)


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> Path:
    policy = adapted(base, critic="adapter", lora={"parts": ("language_model", "projector", "vision")})
    policy.set_action_stats(np.full(4, -0.25), np.full(4, 0.75), np.ones(4, bool))
    policy.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_a_merged_policy_stands_alone(base: Path, trained: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(trained), "--merge", "--out", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert "each of its 31 adapted weights" in " ".join(result.output.split())
    policy, merged = OpenVLAPolicy.from_pretrained(trained), OpenVLAPolicy.from_pretrained(tmp_path / "merged")
    assert torch.allclose(scores(policy), scores(merged), atol=1e-5)
    assert merged.action_stats.q99[0] == 0.75
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def without_one(right: Deltas) -> Deltas:
    """Of ours, one that does little beside the others."""
    right.pop("language_model.model.layers.2.self_attn.q_proj.weight", None) or right.popitem()
    return right


def a_little_much(right: Deltas) -> Deltas:
    return {name: (a, b, 1.05 * scale) for name, (a, b, scale) in right.items()}


@pytest.mark.parametrize("wrong", [without_one, a_little_much])
@pytest.mark.parametrize("of_another_tool", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_other_matrices_is_refused_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong, of_another_tool: bool, dtype: torch.dtype
) -> None:
    whole, folder = stored_as(dtype, base, tmp_path / "whole"), tmp_path / "trained"
    if of_another_tool:
        foreign(whole, folder)
    else:
        adapted(whole).save_pretrained(folder)
    right = lora_export.deltas
    monkeypatch.setattr(lora_export, "deltas", lambda *of: wrong(right(*of)))
    with pytest.raises(CheckpointError, match="than rounding explains"):
        export.export_merged(folder, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "trained"}


def test_a_full_disk_is_told_and_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(lora_export, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        export.export_merged(trained, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"trained"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_disk_made_of_a_merge_is_noticed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """One number of a weight is off by a few roundings, or one of a weight without adapters by any amount."""
    adapted(stored_as(dtype, base, tmp_path / "whole")).save_pretrained(tmp_path / "trained")
    write = lora_export.save_file
    for name in ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.norm.weight"):

        def damaged(state: dict[str, torch.Tensor], path: Path, metadata: object, name: str = name) -> None:
            state[name].view(-1)[5] *= 1 + 4 * torch.finfo(dtype).eps
            write(state, path, metadata)

        monkeypatch.setattr(lora_export, "save_file", damaged)
        with pytest.raises(CheckpointError, match=f"the weight {name} is further from its base"):
            export.export_merged(tmp_path / "trained", tmp_path / "merged")
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "trained"}


def test_a_merge_says_how_much_it_changed(base: Path, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole, folder = stored_as(dtype, base, tmp_path / f"{dtype}"), tmp_path / f"policy {dtype}"
        adapted(whole).save_pretrained(folder)
        found = export.export_merged(folder, tmp_path / f"merged {dtype}").check
        before, after = (load_file(each / "model.safetensors") for each in (whole, tmp_path / f"merged {dtype}"))
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        added, length = (sum(each.double().square().sum() for each in all_of) for all_of in (
            [after[name].double() - before[name].double() for name in changed], [before[name] for name in changed]
        ))  # fmt: skip
        assert found.num_weights == len(changed) == 21 and 0 < found.error <= 1
        assert found.change == pytest.approx(float(added / length) ** 0.5, rel=1e-3)
        assert after[changed[0]].dtype == dtype


def test_without_merge_peft_reads_what_is_written(base: Path, trained: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(trained), "--out", str(tmp_path / "alone")])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "dataset_statistics.json", "manifest.json"}
    assert OpenVLAPolicy.from_pretrained(tmp_path / "alone").action_stats.q99[0] == 0.75  # not the base's
    wrapped = PeftModel.from_pretrained(OpenVLAPolicy.from_pretrained(base), str(tmp_path / "alone"))  # pyright: ignore
    assert torch.allclose(scores(wrapped.base_model.model), scores(OpenVLAPolicy.from_pretrained(trained)), atol=1e-6)


def test_adapters_without_their_matrices_are_named(trained: Path, tmp_path: Path) -> None:
    (trained / "adapter_model.safetensors").unlink()
    for options in ([], ["--merge"]):
        result = CliRunner().invoke(app, ["export", str(trained), *options, "--out", str(tmp_path / "out")])
        assert isinstance(result.exception, CheckpointError), result.exception
        assert "adapter_model.safetensors is missing" in str(result.exception)
        assert {path.name for path in tmp_path.iterdir()} == {"trained"}


def test_what_cannot_be_exported_is_named(base: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapters"):
        export.export_merged(base, tmp_path / "merged")
    with pytest.raises(ConfigError, match="exists already"):
        export.export_merged(trained, trained)
    unseal(trained)
    stored = load_file(trained / "adapter_model.safetensors")
    stored["base_model.model.language_model.other.lora_A.weight"] = torch.zeros(3, 4)
    stored["base_model.model.language_model.other.lora_B.weight"] = torch.zeros(4, 3)
    save_file(stored, trained / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not have: language_model\.other"):
        export.export_merged(trained, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- statistics on an official base -----------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = official_folder.write_official(tmp_path / "official")
    ids = json.loads((folder / "config.json").read_text())["timm_model_ids"]
    monkeypatch.setattr(official_module, "KNOWN_HEADS", dict(zip(ids, official_folder.HEADS, strict=True)))
    return folder


def own_stats(value: float, size: int = 7) -> dict:
    return {"action": {"q01": [-value] * size, "q99": [value] * size, "mask": [True] * size}}


@pytest.mark.parametrize("dataset", ["tiny_a", None])
def test_a_merged_official_checkpoint_keeps_the_names_of_its_statistics(
    official: Path, tmp_path: Path, dataset: str | None
) -> None:
    config = official_module.official_config(official).model_copy(update={"checkpoint": official, "dataset": dataset})
    policy = OpenVLAPolicy(config.model_copy(update={"lora": LoRAConfig(rank=2)}))
    policy.set_action_stats(np.full(7, -0.25), np.full(7, 0.75), np.ones(7, bool))
    policy.save_pretrained(tmp_path / "trained")
    assert OpenVLAPolicy.from_pretrained(tmp_path / "trained").action_stats.q99[0] == 0.75
    assert statistics.norm_stats(tmp_path / "trained").keys() == {"reachrl"}
    export.export_merged(tmp_path / "trained", tmp_path / "merged")
    there = json.loads((tmp_path / "merged" / "config.json").read_text())["norm_stats"]
    assert there.keys() == {"tiny_a", "tiny_b", dataset or "reachrl"}
    assert there["tiny_b"] == json.loads((official / "config.json").read_text())["norm_stats"]["tiny_b"]
    for name in (dataset, None):
        merged = config.model_copy(update={"checkpoint": tmp_path / "merged", "dataset": name})
        assert OpenVLAPolicy(merged).action_stats.q99[0] == 0.75


def test_statistics_beside_adapters_of_another_tool_win(official: Path, tmp_path: Path) -> None:
    folder = foreign(official, tmp_path / "foreign")
    assert OpenVLAPolicy.load_official(folder, dataset="tiny_b").action_stats.q99[0] != 0.5
    (folder / "dataset_statistics.json").write_text(json.dumps({"lib": own_stats(0.5), "tiny_a": own_stats(0.25)}))
    export.export_merged(folder, tmp_path / "merged")
    for place in (folder, tmp_path / "merged"):
        assert OpenVLAPolicy.load_official(place, dataset="lib").action_stats.q99[0] == 0.5
        assert OpenVLAPolicy.load_official(place, dataset="tiny_a").action_stats.q99[0] == 0.25
        assert OpenVLAPolicy.load_official(place, dataset="tiny_b").action_stats.q99[0] not in (0.25, 0.5)
        with pytest.raises(CheckpointError, match=r"no action statistics named 'other'; it has \['lib', 'tiny_a'"):
            OpenVLAPolicy.load_official(place, dataset="other")


def test_the_only_statistics_beside_adapters_need_no_name(base: Path, official: Path, tmp_path: Path) -> None:
    for whole in (base, official):
        folder = foreign(whole, tmp_path / f"on_{whole.name}")
        stats = {"lib": own_stats(0.25, 7 if whole is official else 4)}
        (folder / "dataset_statistics.json").write_text(json.dumps(stats))
        export.export_merged(folder, tmp_path / f"merged_{whole.name}")
        for place in (folder, tmp_path / f"merged_{whole.name}"):
            assert OpenVLAPolicy.from_pretrained(place).action_stats.q99[0] == 0.25
