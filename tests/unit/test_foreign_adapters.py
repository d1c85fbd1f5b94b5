"""Adapters that peft wrote for the official class: trained on, saved, exported; with what OpenVLA-OFT keeps beside."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from official_peft import ALL_OF_0_11, OfficialClass, write_adapters
from oft_folder import DATA, HEADS, PROPRIO_FILE, WHOLE, load, part, recorded, write_oft
from peft import PeftModel
from safetensors.torch import load_file
from test_oft_folders import rows

from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.errors import CheckpointError
from reachrl.policies.folders import kind_of
from reachrl.policies.lora.adapters import CRITIC, active
from reachrl.policies.openvla import official as official_module
from reachrl.policies.openvla.export import export_adapter, export_merged
from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy

LINEARS = ["language_model", "projector", "vision"]
EVERYTHING = [*LINEARS, "patches", "head"]
TOLD = {"chunk_size": 8, "dialect": "simplevla_rl"}


@pytest.fixture(autouse=True)
def known_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = json.loads((DATA / "config.json").read_text())["timm_model_ids"]
    monkeypatch.setattr(official_module, "KNOWN_HEADS", dict(zip(ids, HEADS, strict=True)))


def section(folder: Path, base: Path, lora: dict[str, Any] | None, **told: Any) -> OpenVLAOFTConfig:
    """What a run configures: the sizes, what no file states, and adapters to train."""
    sizes = official_module.official_config(base, HEADS, section=OpenVLAOFTConfig)
    said = {key: getattr(sizes, key) for key in sizes.model_fields_set} | {**TOLD, **told}
    adapters = None if lora is None else {"rank": 2, "alpha": 4.0, **lora}
    return OpenVLAOFTConfig.model_validate({**said, "checkpoint": folder, "lora": adapters})


def logits(policy: OpenVLAOFTPolicy, cameras: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return policy.action_logits(rows(cameras), recorded()["tokens_tokens"])[0]


@pytest.mark.parametrize(("targets", "parts"), [("all-linear", LINEARS), (list(ALL_OF_0_11), EVERYTHING)])
def test_adapters_on_all_linear_maps_are_trained_on(tmp_path: Path, targets: Any, parts: list[str]) -> None:
    base = write_oft(tmp_path / "base")
    folder = write_adapters(base, tmp_path / "adapters", targets=targets)
    stored = load_file(folder / "adapter_model.safetensors")
    assert any(".blocks.3." in key for key in stored)  # of a block that nothing reads
    assert any("lm_head.lora_" in key for key in stored) == ("head" in parts)
    folded = OpenVLAOFTPolicy(section(folder, base, None))
    policy = OpenVLAOFTPolicy(section(folder, base, {"parts": parts}, critic="adapter"))
    plain = load(base, dialect="simplevla_rl")
    assert (logits(policy) - logits(folded)).abs().max() < 1e-3 < 1 < (logits(folded) - logits(plain)).abs().max()
    sample = policy.act(rows(1))
    scored = policy.evaluate(rows(1), sample.token_ids)
    assert (sample.logprobs - scored.logprobs).abs().max() < 1e-4
    with torch.no_grad():
        seen, actors = policy.cache(rows(1)), policy.chunk_hidden(rows(1))
        with active(policy, CRITIC):  # which begins as the actor
            assert (policy.chunk_hidden(seen) - actors).abs().max() < 1e-5

    scored.logprobs.sum().backward()
    trained = [p for role in ("trunk", "vision") for p in policy.parameter_groups()[role]]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.sub_(0.05 * parameter.grad.sign())
    policy.save_pretrained(tmp_path / "trained")
    again = OpenVLAOFTPolicy.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again), logits(policy))

    export_adapter(tmp_path / "trained", tmp_path / "alone")
    export_merged(tmp_path / "trained", tmp_path / "merged")
    keys = {line.split(" ")[0] for line in (DATA / "keys.txt").read_text().splitlines()}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == keys
    # Peft puts the exported matrices on the official modules; merged there, they are our merged weights.
    theirs = PeftModel.from_pretrained(OfficialClass(base), str(tmp_path / "alone")).merge_and_unload()
    for key, tensor in theirs.state_dict().items():
        assert (tensor - merged[key]).abs().max() < 1e-5, key
    changed = {key for key, tensor in load_file(base / "model.safetensors").items() if not tensor.equal(merged[key])}
    assert ("language_model.lm_head.weight" in changed) == ("head" in parts)
    assert (logits(OpenVLAOFTPolicy.from_pretrained(tmp_path / "merged")) - logits(policy)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "lora", "says"),
    [
        ({}, {"rank": 4}, r"set policy\.lora\.rank=2 and policy\.lora\.alpha=4 "),
        ({"use_rslora": True, "r": 4}, {"rank": 4}, r"of rank 4 and scale 2, .* scale 1: .* policy\.lora\.alpha=8 "),
        ({}, {}, r"adapters on \d+ weights that .*set policy\.lora\.parts=\[\"language_model\", \"projector\", \"vis"),
        ({"targets": ["lm_head"]}, {}, r"set policy\.lora\.parts=\[\"language_model\", \"head\"\]"),
    ],
)
def test_what_does_not_fit_the_adapters_says_what_to_set(tmp_path, options, lora, says) -> None:
    base = write_oft(tmp_path / "base")
    folder = write_adapters(base, tmp_path / "adapters", **options)
    with pytest.raises(CheckpointError, match=says):
        OpenVLAOFTPolicy(section(folder, base, lora))


def test_adapters_on_fewer_maps_begin_as_they_are(tmp_path: Path) -> None:
    base = write_oft(tmp_path / "base")
    folder = write_adapters(base, tmp_path / "adapters", targets=["q_proj", "v_proj"])
    policy = OpenVLAOFTPolicy(section(folder, base, {}))
    assert (logits(policy) - logits(OpenVLAOFTPolicy(section(folder, base, None)))).abs().max() < 1e-3


# --- a folder of OpenVLA-OFT's training: RUN/lora_adapter, the companions in RUN -----------------------------------


def oft_run(tmp_path: Path) -> tuple[Path, Path]:
    """The base, without a state, and the folder of a run whose projector and statistics lie beside `lora_adapter`."""
    base, run = write_oft(tmp_path / "base"), tmp_path / "run"
    write_adapters(base, run / "lora_adapter")
    torch.save(part("proprio_projector"), run / PROPRIO_FILE)
    stats = json.loads((base / "dataset_statistics.json").read_text())
    entry = next(iter(stats.values()))
    entry["action"]["q99"] = [0.5] * 7
    (run / "dataset_statistics.json").write_text(json.dumps({"mine": entry}))
    shutil.rmtree(run / "lora_adapter" / "README.md", ignore_errors=True)
    return base, run


def test_the_companions_of_an_adapter_lie_in_the_folder_above(tmp_path: Path) -> None:
    base, run = oft_run(tmp_path)
    folder = run / "lora_adapter"
    assert kind_of(folder) == "openvla_oft"
    policy = OpenVLAOFTPolicy(section(folder, base, {"parts": LINEARS}, **WHOLE))
    assert torch.equal(policy.proprio_projector.fc1.weight, part("proprio_projector", "")["fc1.weight"])
    assert policy.action_stats.q99[0] == 0.5
    folded = load(folder, dialect="simplevla_rl", **WHOLE)
    assert (logits(folded, 2) - logits(policy, 2)).abs().max() < 1e-3
    with torch.no_grad():
        for parameter in policy.parameter_groups()["trunk"]:
            parameter.add_(0.01)
    policy.save_pretrained(tmp_path / "trained")
    (run / PROPRIO_FILE).unlink()  # what was saved stands alone but for the base
    for again in (
        OpenVLAOFTPolicy.from_pretrained(tmp_path / "trained"),
        OpenVLAOFTPolicy(section(tmp_path / "trained", base, {"parts": LINEARS}, **WHOLE)),
    ):
        assert torch.equal(logits(again, 2), logits(policy, 2))
        assert again.action_stats.q99[0] == 0.5
    export_merged(tmp_path / "trained", tmp_path / "merged")
    export_adapter(tmp_path / "trained", tmp_path / "lora_adapter")
    for place in ("merged", "lora_adapter"):
        read = load(tmp_path / place, dialect="simplevla_rl", **WHOLE)
        assert (logits(read, 2) - logits(policy, 2)).abs().max() < 1e-3
        assert torch.equal(read.proprio_projector.fc2.bias, policy.proprio_projector.fc2.bias)
        assert read.action_stats.q99[0] == 0.5
    assert json.loads((tmp_path / "merged" / "dataset_statistics.json").read_text()).keys() == {"mine"}


def test_an_adapter_of_another_tool_is_merged_with_its_companions_and_stays_known(tmp_path: Path) -> None:
    _, run = oft_run(tmp_path)
    export_merged(run / "lora_adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / PROPRIO_FILE).read_bytes() == (run / PROPRIO_FILE).read_bytes()
    read = load(tmp_path / "merged", dialect="simplevla_rl", **WHOLE)
    beside = load(run / "lora_adapter", dialect="simplevla_rl", **WHOLE)
    assert torch.equal(logits(read, 2), logits(beside, 2)) and read.action_stats.q99[0] == 0.5
    (run / PROPRIO_FILE).unlink()
    export_merged(run / "lora_adapter", tmp_path / "bare")  # nothing but what the export states says what it is
    assert kind_of(tmp_path / "bare") == "openvla_oft"


def test_what_lies_above_an_adapter_is_not_overlooked(tmp_path: Path) -> None:
    base, run = oft_run(tmp_path)
    with pytest.raises(CheckpointError, match=rf"by {PROPRIO_FILE} the robot's state is a token.*state_size is not"):
        load(run / "lora_adapter", dialect="simplevla_rl")
    (run / "action_head--150000_checkpoint.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"action_head--150000_checkpoint\.pt it has a regression head"):
        OpenVLAOFTPolicy(section(run / "lora_adapter", base, {"parts": LINEARS}, **WHOLE))
    with pytest.raises(CheckpointError, match=rf"{run} .*give {run / 'lora_adapter'}"):
        kind_of(run)
