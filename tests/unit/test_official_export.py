"""Policies trained without adapters become official checkpoints: the official classes' keys, the trained function."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from official_folder import HEADS, read, to_native, write_official
from safetensors.torch import load_file, save_file
from small_policy import adapted, inputs, small

from reachrl.errors import CheckpointError, ConfigError
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.official_export import export_official
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import fit_frames

DEAD = ("vision_backbone.featurizer.blocks.3.", "vision_backbone.fused_featurizer.blocks.4.")


def train(origin: Path, folder: Path, **options: object) -> OpenVLAPolicy:
    """What a training without adapters leaves: other weights, other statistics, a critic."""
    policy = OpenVLAPolicy.load_official(origin, dataset="tiny_a", tower_heads=HEADS, **options)  # pyright: ignore
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    policy.set_action_stats(np.full(7, -0.25), np.full(7, 0.75), np.ones(7, bool))
    policy.save_pretrained(folder)
    return policy


def live(policy: OpenVLAPolicy) -> dict[str, torch.Tensor]:
    return {k: v for k, v in policy.state_dict().items() if not k.startswith(("value_head.", "critic."))}


def greedy(policy: OpenVLAPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    io = {key: torch.from_numpy(value) for key, value in read("io").items()}
    rows = OpenVLAInputs(
        prompt_ids=io["input_ids"].long(), prompt_mask=io["attention_mask"].bool(), pixel_values=io["pixel_values"]
    )
    sample = policy.act(rows, with_values=False)
    return sample.token_ids, sample.logprobs


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return write_official(tmp_path / "origin")


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_official_classes_find_their_keys_and_the_function_is_the_trained_one(
    command_line, origin: Path, tmp_path: Path, critic: str
) -> None:
    policy = train(origin, tmp_path / "sft", critic=critic)
    again = OpenVLAPolicy.from_pretrained(tmp_path / "sft")  # a second stage still knows what it all began as
    again.save_pretrained(tmp_path / "policy")
    code, out, err = command_line("export", tmp_path / "policy", "--out", tmp_path / "exported")
    assert (code, err) == (0, "") and "official checkpoint written" in out
    # The recorded model is the state dict of the official classes.
    official, stored = read("model"), load_file(tmp_path / "exported" / "model.safetensors")
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in official.items()}
    for key in official:
        if key.startswith(DEAD):
            assert torch.equal(stored[key], torch.from_numpy(official[key])), key
    raw = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert raw["model_type"] == "openvla" and raw["torch_dtype"] == "float32"
    assert raw["norm_stats"].keys() == {"tiny_a", "tiny_b"}  # the trained ones under the name they were trained by
    loaded = OpenVLAPolicy.load_official(tmp_path / "exported", dataset="tiny_a", tower_heads=HEADS)
    assert loaded.action_stats.q99[0] == 0.75
    assert live(loaded).keys() == live(policy).keys()
    assert all(torch.equal(value, live(loaded)[key]) for key, value in live(policy).items())
    for ours, theirs in zip(greedy(policy), greedy(loaded), strict=True):
        assert torch.equal(ours, theirs)


def test_how_frames_are_made_is_not_lost(origin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = OpenVLAPolicy.load_official(origin, dataset="tiny_a", tower_heads=HEADS)
    ways = {"center_crop": True, "rlds_frames": True, "resize": "letterbox"}
    policy.config = policy.config.model_copy(update=ways)
    policy.save_pretrained(tmp_path / "policy")
    export_official(tmp_path / "policy", tmp_path / "exported")
    loaded = OpenVLAPolicy.load_official(tmp_path / "exported", tower_heads=HEADS)
    assert {key: getattr(loaded.config, key) for key in ways} == ways
    frames = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3), np.uint8)
    assert np.array_equal(fit_frames(frames, loaded.config), fit_frames(frames, policy.config))
    caplog.clear()
    OpenVLAPolicy(loaded.config.model_copy(update={"checkpoint": tmp_path / "exported", "center_crop": False}))
    assert "was trained on frames made by policy.center_crop=true, configured is false" in caplog.text


def shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names, parts = sorted(weights), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    places = {name: parts[i % 2] for i, name in enumerate(names)}
    for part in parts:
        save_file({name: weights[name] for name in names if places[name] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_and_prismatics_names_become_official_shards(tmp_path: Path) -> None:
    origin = write_official(tmp_path / "origin", to_native)
    shards(origin, load_file(origin / "model.safetensors"))
    policy = train(origin, tmp_path / "policy")
    export_official(tmp_path / "policy", tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read("model").keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in read("model").values())
    loaded = OpenVLAPolicy.load_official(tmp_path / "exported", dataset="tiny_a", tower_heads=HEADS)
    assert all(torch.equal(value, live(loaded)[key]) for key, value in live(policy).items())


def test_a_head_tied_to_the_embedding_is_read_and_written_as_two(tmp_path: Path) -> None:
    text = json.loads((write_official(tmp_path / "plain") / "config.json").read_text())["text_config"]
    origin = write_official(tmp_path / "origin", text_config=text | {"tie_word_embeddings": True})
    weights = load_file(origin / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but the weights hold a"):
        OpenVLAPolicy.load_official(origin, dataset="tiny_a", tower_heads=HEADS)
    del weights["language_model.lm_head.weight"]
    save_file(weights, origin / "model.safetensors")
    policy = OpenVLAPolicy.load_official(origin, dataset="tiny_a", tower_heads=HEADS)
    words = torch.from_numpy(read("model")["language_model.model.embed_tokens.weight"])
    assert torch.equal(policy.language_model.lm_head.weight, words)
    assert torch.equal(policy.language_model.model.embed_tokens.weight, words)
    trained = train(origin, tmp_path / "policy")
    export_official(tmp_path / "policy", tmp_path / "exported")
    loaded = OpenVLAPolicy.load_official(tmp_path / "exported", dataset="tiny_a", tower_heads=HEADS)
    assert all(torch.equal(value, live(loaded)[key]) for key, value in live(trained).items())
    shutil.copyfile(tmp_path / "plain" / "config.json", origin / "config.json")
    with pytest.raises(CheckpointError, match="1 missing: .*lm_head.* set tie_word_embeddings to true"):
        OpenVLAPolicy.load_official(origin, dataset="tiny_a", tower_heads=HEADS)


def test_a_base_that_is_gone_can_be_named(command_line, origin: Path, tmp_path: Path) -> None:
    train(origin, tmp_path / "policy")
    origin.rename(tmp_path / "moved")
    code, _, err = command_line("export", tmp_path / "policy", "--out", tmp_path / "out")
    assert code == 6 and "origin does not exist" in err.replace("\n", " ")
    arguments = ("--out", tmp_path / "out", "--base", tmp_path / "moved")
    assert command_line("export", tmp_path / "policy", *arguments)[0] == 0
    OpenVLAPolicy.load_official(tmp_path / "out", dataset="tiny_a", tower_heads=HEADS)


def test_what_has_no_official_layout_is_told(base: Path, origin: Path, tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], message: str, **options: Path) -> None:
        with pytest.raises(error, match=message):
            export_official(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(origin, ConfigError, "in the official layout already")
    refused(base, ConfigError, "does not say which official checkpoint .* --base")
    refused(base, ConfigError, "was written by ReachRL", base=base)
    refused(base, CheckpointError, "2 vision towers .* but 1 were described", base=origin)
    train(origin, tmp_path / "policy")
    raw = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps(raw | {"text_config": raw["text_config"] | {"rope_theta": 5.0}}))
    refused(tmp_path / "policy", CheckpointError, "another architecture: .*rope_theta")
    conv = {"towers": ({"kind": "conv", "stages": [{"channels": 8, "kernel": 8, "stride": 8}]},)}
    OpenVLAPolicy(small(**conv)).save_pretrained(tmp_path / "conv")
    refused(tmp_path / "conv", ConfigError, "convolutional towers")


def test_options_of_the_other_kind_are_refused(command_line, base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "adapted")
    code, _, err = command_line("export", tmp_path / "adapted", "--out", tmp_path / "out", "--base", base)
    assert code == 2 and "--base is for whole weights" in err
    code, _, err = command_line("export", base, "--out", tmp_path / "out", "--merge")
    assert code == 2 and "holds no adapters" in err and "without --merge" in err.replace("\n", " ")


def test_random_weights_have_no_origin_and_saved_ones_read_back(base: Path, tmp_path: Path) -> None:
    policy = OpenVLAPolicy.from_pretrained(base)
    assert policy.origin is None
    policy.save_pretrained(tmp_path / "again")
    other = OpenVLAPolicy.from_pretrained(tmp_path / "again")
    assert torch.equal(other.act(inputs(other)).logprobs, policy.act(inputs(policy)).logprobs)
