"""Folders of OpenVLA-OFT as real tools leave them: read, refused with the reason, exported and read again."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oft_folder import DATA, HEADS, PROPRIO_FILE, WHOLE, load, part, recorded, write_oft
from safetensors.torch import load_file, save_file
from small_policy import foreign, unseal

from reachrl.config.policy import LoRAConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.folders import folders_of, kind_of
from reachrl.policies.openvla import official as official_module
from reachrl.policies.openvla.export import export_merged
from reachrl.policies.openvla.official_export import export_official
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla_oft.inputs import OFTInputs
from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy
from reachrl.policies.openvla_oft.verify import verify


@pytest.fixture(autouse=True)
def known_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = json.loads((DATA / "config.json").read_text())["timm_model_ids"]
    monkeypatch.setattr(official_module, "KNOWN_HEADS", dict(zip(ids, HEADS, strict=True)))


def rows(cameras: int = 2) -> OFTInputs:
    io = recorded()
    images = (io["pixel_values"], io["wrist_pixel_values"])[:cameras]
    return OFTInputs(
        prompt_ids=io["input_ids"],
        prompt_mask=io["attention_mask"].bool(),
        pixel_values=torch.cat(images, 1),
        state=io["proprio"].float() if cameras == 2 else None,
    )


def leave(name: str, content: object = "") -> Callable[[Path], object]:
    def mark(folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return torch.save(content, path) if name.endswith(".pt") else path.write_text(str(content))

    return mark


def state_in_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        (leave("action_head--150000_checkpoint.pt"), r"action_head--150000_checkpoint\.pt it has a regression head"),
        (
            leave("noisy_action_projector--9_checkpoint.pt"),
            r"noisy_action_projector--9\S+ it has a diffusion",
        ),
        (leave("vision_backbone--9_checkpoint.pt"), r"vision_backbone--9_checkpoint\.pt.*\(FiLM\)"),
        (lambda folder: state_in_config(folder, use_l1_regression=True), r"use_l1_regression in config\.json"),
    ],
)
def test_heads_without_token_probabilities_are_refused_with_the_reason(tmp_path, mark, says):
    folder = write_oft(tmp_path / "checkpoint")
    mark(folder)
    for look in (lambda: load(folder), lambda: OpenVLAPolicy.load_official(folder, tower_heads=HEADS)):
        with pytest.raises(CheckpointError, match=says) as caught:
            look()
        if "FiLM" not in says:
            assert "no token probabilities" in str(caught.value)
            assert "Haozhan72/Openvla-oft-SFT-libero10-traj1" in str(caught.value)


@pytest.mark.parametrize(
    ("mark", "told", "says"),
    [
        (lambda folder: None, {"chunk_size": None}, r"set policy\.chunk_size \(actions of an answer"),
        (lambda folder: None, {"dialect": None}, r"set policy\.dialect \(the program that trained it"),
        (
            leave(PROPRIO_FILE, part("proprio_projector")),
            {},
            r"proprio_projector--150000\S+ .*state_size is not",
        ),
        (lambda folder: None, {"state_size": 8}, r"no proprio_projector--N_checkpoint\.pt beside"),
        (leave(PROPRIO_FILE, part("proprio_projector")), {"state_size": 14}, r"state_size = 14, but .* have 8 dim"),
        (lambda folder: state_in_config(folder, num_images_in_input=2), {}, r"set policy\.num_cameras=2"),
        (lambda folder: state_in_config(folder, action_chunk_size=5), {}, r"set policy\.chunk_size=5"),
        (lambda folder: state_in_config(folder, use_proprio=True), {}, r"use_proprio in config\.json"),
        (lambda folder: state_in_config(folder, implement_version="rlinf"), {}, r"set policy\.dialect=rlinf"),
        (
            lambda folder: state_in_config(folder, implement_version="official"),
            {"dialect": "rlinf"},
            r"which does not close the sequence with </s>; set policy\.dialect=official",
        ),
        (leave("constants.py", '"NUM_ACTIONS_CHUNK": 25, x\n"NUM_ACTIONS_CHUNK": 5'), {}, "chunks of 5 or 25 actions"),
    ],
)
def test_what_a_file_states_is_not_contradicted(tmp_path, mark, told, says):
    folder = write_oft(tmp_path / "checkpoint")
    mark(folder)
    options = {key: value for key, value in ({"chunk_size": 8, "dialect": "official"} | told).items() if value}
    with pytest.raises((CheckpointError, ConfigError), match=says):
        OpenVLAOFTPolicy.load_official(folder, tower_heads=HEADS, **options)


def test_statistics_of_another_dimension_are_named(tmp_path):
    folder = write_oft(tmp_path / "checkpoint", state=True)
    path = folder / "dataset_statistics.json"
    stats = json.loads(path.read_text())
    stats["libero_spatial_no_noops"]["proprio"] = {"q01": [0.0] * 7, "q99": [1.0] * 7}
    path.write_text(json.dumps(stats))
    with pytest.raises(ConfigError, match=r"policy\.state_size = 8, but the statistics of the state have 7 dimensions"):
        load(folder, **WHOLE)
    del stats["libero_spatial_no_noops"]["proprio"]
    path.write_text(json.dumps(stats))
    with pytest.raises(CheckpointError, match=r"damaged \(KeyError\('proprio'\)\)"):
        load(folder, **WHOLE)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"type": "pi0"}, "it is pi0 by type = 'pi0'.*no token probabilities"),
        ({"type": "pi05"}, r"it is pi0\.5"),
        ({"type": "smolvla"}, "it is SmolVLA"),
        ({"model_type": "gr00t_n1_5"}, "it is GR00T by model_type"),
        ({"model_type": "qwen2_5_vl"}, "which no policy kind of this version computes|set policy.kind=qwen_fast"),
        ({"type": "pi0_fast"}, "which no policy kind of this version computes|set policy.kind=pi0_fast"),
    ],
)
@pytest.mark.parametrize("policy", [OpenVLAPolicy, OpenVLAOFTPolicy])
def test_other_families_are_named(tmp_path, policy, config, says):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        policy.load_official(tmp_path)
    with pytest.raises(CheckpointError, match=says):  # of `reachrl model info` and `load_policy`
        kind_of(tmp_path)


def test_a_folder_with_a_sign_is_of_this_kind(tmp_path):
    plain = write_oft(tmp_path / "plain")
    signed = write_oft(tmp_path / "signed", state=True)
    assert (kind_of(plain), kind_of(signed)) == ("openvla", "openvla_oft")
    facts = folders_of(signed)[1].inspect(signed).facts
    assert facts["layout"].endswith(f"OpenVLA-OFT by the file {PROPRIO_FILE}: another function than plain OpenVLA's")
    assert facts["kind"].startswith("policy.kind=openvla_oft, with policy.chunk_size")


def test_whole_weights_are_exported_in_the_official_layout_and_read_again(tmp_path):
    base = write_oft(tmp_path / "base", state=True)
    policy = load(base, **WHOLE)
    with torch.no_grad():
        for parameter in policy.parameter_groups()["trunk"]:
            parameter.add_(
                0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    policy.save_pretrained(tmp_path / "trained")
    export_official(tmp_path / "trained", tmp_path / "out")
    keys = {line.split(" ")[0] for line in (DATA / "keys.txt").read_text().splitlines()}
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == keys
    written = torch.load(tmp_path / "out" / PROPRIO_FILE, weights_only=True)  # as the official code reads it
    assert torch.equal(written["fc1.weight"], policy.proprio_projector.fc1.weight)
    again = load(tmp_path / "out", **WHOLE)
    assert torch.equal(again.act(rows()).token_ids, policy.act(rows()).token_ids)
    np.testing.assert_allclose(again.state_stats.q01, policy.state_stats.q01)


def test_adapters_on_an_official_base_are_merged_with_the_states_projector(tmp_path):
    base = write_oft(tmp_path / "base", state=True)
    config = load(base, **WHOLE).config
    torch.manual_seed(0)
    policy = OpenVLAOFTPolicy(config.model_copy(update={"lora": LoRAConfig(rank=2, alpha=4.0)}))
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    policy.save_pretrained(tmp_path / "trained")
    export_merged(tmp_path / "trained", tmp_path / "merged")
    ours, theirs = (torch.load(each / PROPRIO_FILE, weights_only=True) for each in (tmp_path / "merged", base))
    assert all(torch.equal(tensor, theirs[f"module.{name}"]) for name, tensor in ours.items())
    merged = load(tmp_path / "merged", **WHOLE, dialect=config.dialect)
    ids = policy.act(rows()).token_ids
    ours, theirs = (each.action_logits(rows(), ids)[0] for each in (policy, merged))
    assert (ours - theirs).abs().max() < 1e-3
    assert (ours - load(base, **WHOLE).action_logits(rows(), ids)[0]).abs().max() > 0.1


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=4.0)])
def test_an_export_states_what_the_layout_does_not(tmp_path, lora, caplog):
    """Minimum and maximum as statistics, two images, a state, a dialect, the frames' way, the data set's name."""
    base = write_oft(tmp_path / "base", state=True)
    told = {**WHOLE, "statistics": "bounds", "dialect": "rlinf", "center_crop": True}
    config = load(base, **told).config.model_copy(update={"lora": lora, "center_crop": True, "resize": "letterbox"})
    policy = OpenVLAOFTPolicy(config)
    policy.save_pretrained(tmp_path / "trained")
    write = export_official if lora is None else export_merged
    write(tmp_path / "trained", tmp_path / "out")
    again = OpenVLAOFTPolicy.from_pretrained(tmp_path / "out", **({} if lora is None else {"dialect": "rlinf"}))
    ids = policy.act(rows()).token_ids
    assert torch.equal(again.act(rows()).token_ids, ids)
    assert np.array_equal(again.decode_actions(ids), policy.decode_actions(ids))
    state = np.linspace(-1, 1, 8, dtype=np.float32)[None]
    assert torch.equal(again._encode_state(state), policy._encode_state(state))
    keys = ("dialect", "chunk_size", "num_cameras", "state_size", "statistics", "center_crop", "resize")
    assert all(getattr(again.config, key) == getattr(config, key) for key in keys)
    # As the official code reads it: by the data set's name, ends of the kind that ALOHA's programs take.
    name, entry = next(iter(json.loads((base / "dataset_statistics.json").read_text()).items()))
    stats = json.loads((tmp_path / "out" / "dataset_statistics.json").read_text())
    assert stats.keys() == {name} and stats[name]["action"]["min"] == entry["action"]["min"]
    with pytest.raises(CheckpointError, match=r"num_cameras = 2 by what its export states .*set policy\.num_cameras=2"):
        load(tmp_path / "out", **WHOLE | {"num_cameras": 1}, dialect="rlinf")
    assert kind_of(tmp_path / "out") == "openvla_oft"
    (unseal(tmp_path / "out") / PROPRIO_FILE).unlink()
    assert kind_of(tmp_path / "out") == "openvla_oft"
    with pytest.raises(CheckpointError, match="OpenVLA-OFT checkpoint by what an export of ReachRL states"):
        OpenVLAPolicy.load_official(tmp_path / "out", tower_heads=HEADS)


def recording(path: Path, name: str) -> Path:
    io, outputs = recorded(), ("hidden", "logits", "actions")
    content = {key: io[key] for key in ("input_ids", "attention_mask", "proprio_raw", "proprio_token")}
    content |= {key: io[f"{name}_{key}"] for key in outputs} | {"tokens": io[f"{name}_tokens_full"]}
    content["pixel_values"] = torch.cat([io["pixel_values"], io["wrist_pixel_values"]], 1)
    content["projected"] = torch.cat([io["projected"], io["projected_wrist"]], 1)
    save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
    return path


def test_verify_computes_the_recording_again_and_notices_a_wrong_dialect(tmp_path):
    folder, file = write_oft(tmp_path / "base", state=True), recording(tmp_path / "io.safetensors", "tokens2p")
    options = {"chunk_size": "8", "dialect": "official", "num_cameras": "2", "state_size": "8"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # by which logits would be 1e-4 apart
    try:
        result = verify(folder, file, tower_heads=HEADS, options=options)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert result.passed and len(result.checks) == 6 and not result.missing and not result.ignored
    wrong = verify(folder, file, tower_heads=HEADS, options=options | {"dialect": "rlinf"})
    assert {check.name for check in wrong.checks if not check.passed} == {"hidden", "logits", "tokens", "actions"}
    with pytest.raises(ConfigError, match="--option temperature: expected one of chunk_size"):
        verify(folder, file, options={"temperature": "1"})
    with pytest.raises(ConfigError, match="--option chunk_size"):
        verify(folder, file, options={"chunk_size": "many"})


def test_adapters_as_peft_writes_them_are_folded_into_their_base(tmp_path):
    base = write_oft(tmp_path / "base")
    adapters = foreign(base, tmp_path / "lora_adapter", read_by=lambda folder: load(folder, dialect="simplevla_rl"))
    policy = load(adapters, dialect="simplevla_rl")
    stored = load_file(adapters / "adapter_model.safetensors")
    whole = load_file(base / "model.safetensors")
    for name in ("language_model.model.layers.1.mlp.up_proj", "language_model.lm_head"):
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = whole[f"{name}.weight"] + 2.0 * b @ a  # alpha / r = 4 / 2
        assert (policy.get_submodule(name).weight - expected).abs().max() < 1e-5
        assert (b @ a).abs().max() > 0.01
    with pytest.raises(CheckpointError, match=r"no proprio_projector--N_checkpoint\.pt beside"):
        load(adapters, dialect="simplevla_rl", **WHOLE)
