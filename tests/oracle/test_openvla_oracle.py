"""OpenVLA against recorded outputs of the official code (see data/openvla/README.md)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from reachrl.config.policy import OpenVLAConfig
from reachrl.errors import CheckpointError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.action_tokens import tokens_from_unit, unit_from_tokens
from reachrl.policies.decoding.decode import action_logits
from reachrl.policies.llama import last_hidden
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.official import official_stats
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import as_in_rlds, center_crop, fit_frames, normalise_pixels, resize_naive
from reachrl.policies.openvla.sequence import arrange

DATA = Path(__file__).parent / "data" / "openvla"
HEADS = (4, 4)
NUM_PATCHES = 16
IMAGENET_MEAN, IMAGENET_STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    shutil.copy(DATA / "config.json", folder)
    save_file(load("model"), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def policy(folder: Path) -> OpenVLAPolicy:
    return OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in load("io").items()}


def inputs_of(io: dict[str, torch.Tensor]) -> OpenVLAInputs:
    return OpenVLAInputs(
        prompt_ids=io["input_ids"], prompt_mask=io["attention_mask"].bool(), pixel_values=io["pixel_values"]
    )


def gap(ours: torch.Tensor, recorded: torch.Tensor) -> float:
    return (ours - recorded).abs().max().item()


def test_vision_and_projector(policy: OpenVLAPolicy, io: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        features = policy.vision_features(io["pixel_values"])
        projected = policy.projector(features)
    # equal to the last bit on the recording's instruction set; other kernels differ by ulps of numbers around 4
    assert gap(features, io["vision_features"]) <= 1e-6
    assert gap(projected, io["projected"]) <= 1e-6


def test_logits_at_every_position_of_a_padded_batch(policy: OpenVLAPolicy, io: dict[str, torch.Tensor]) -> None:
    inputs = inputs_of(io)
    with torch.no_grad():
        model = policy.language_model.model
        features = policy.vision_features(inputs.pixel_values)
        embeds, valid = arrange(model, policy.projector(features), inputs)
        logits = action_logits(last_hidden(model, embeds, valid, embeds.shape[1]), policy._head(), 1.0)
    for row, length in enumerate(io["prompt_len"].tolist()):
        recorded = io["action_row_logits"][row, : length + NUM_PATCHES]
        assert recorded.abs().max() > 5  # the comparison is not between zeros
        assert gap(logits[row, valid[row]], recorded) <= 5e-5


def test_greedy_tokens_and_actions(policy: OpenVLAPolicy, io: dict[str, torch.Tensor]) -> None:
    sample = policy.act(inputs_of(io))
    assert torch.equal(sample.token_ids, io["tokens"])
    unit = unit_from_tokens(sample.token_ids.numpy(), 32000)
    np.testing.assert_allclose(policy.action_stats.unnormalise(unit), io["actions"].numpy(), rtol=0, atol=1e-15)
    np.testing.assert_allclose(policy.decode_actions(sample.token_ids)[:, 0], io["actions"].numpy(), rtol=0, atol=1e-7)


def test_actions_of_the_other_dataset(folder: Path, io: dict[str, torch.Tensor]) -> None:
    stats = official_stats(folder, "tiny_b")
    assert stats is not None
    # the official code appends the closing token itself: the tokens are those of prompt 0
    unit = unit_from_tokens(io["tokens"][0].numpy(), 32000)
    recorded = io["actions_noempty_tiny_b"].numpy()
    np.testing.assert_allclose(stats.unnormalise(unit), recorded, rtol=0, atol=1e-15)
    back = tokens_from_unit(stats.normalise(recorded), 32000)
    np.testing.assert_allclose(unit_from_tokens(back, 32000), unit, rtol=0, atol=1e-15)


def test_teacher_forced_logits(policy: OpenVLAPolicy, io: dict[str, torch.Tensor]) -> None:
    logits, _ = policy.action_logits(inputs_of(io), io["tokens"])
    assert gap(logits, io["tf_action_logits"]) <= 5e-5


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_decoded_logprobs_are_the_recorded_ones(
    policy: OpenVLAPolicy, io: dict[str, torch.Tensor], temperature: float
) -> None:
    sample = policy.act(inputs_of(io), temperature=temperature)
    scored = policy.evaluate(inputs_of(io), sample.token_ids, temperature=temperature)
    recorded = (io["tf_action_logits"] / temperature).log_softmax(-1)
    chosen = recorded.gather(-1, (io["tokens"] - 31744).unsqueeze(-1)).squeeze(-1)
    assert gap(sample.logprobs, chosen) <= 5e-5
    assert gap(sample.logprobs, scored.logprobs) <= 1e-5
    assert gap(scored.entropy, -(recorded.exp() * recorded).sum(-1)) <= 5e-5


def left(ids: list[int], width: int) -> list[int]:
    return [32000] * (width - len(ids)) + ids


def right(ids: list[int], width: int) -> list[int]:
    return ids + [32000] * (width - len(ids))


def after_bos(ids: list[int], width: int) -> list[int]:
    return ids[:1] + [32000] * (width - len(ids)) + ids[1:]


def scattered(ids: list[int], width: int) -> list[int]:
    row = list(ids)
    for k in range(width - len(ids)):
        row.insert((3 * k + 1) % len(row), 32000)
    return row


@pytest.mark.parametrize("place", [left, right, after_bos, scattered])
@pytest.mark.parametrize("width", [17, 24])
def test_padding_changes_nothing(policy: OpenVLAPolicy, io: dict[str, torch.Tensor], place, width: int) -> None:
    rows = [ids[:length].tolist() for ids, length in zip(io["input_ids"], io["prompt_len"], strict=True)]
    ids = torch.tensor([place(row, width) for row in rows])
    inputs = OpenVLAInputs(prompt_ids=ids, prompt_mask=ids != 32000, pixel_values=io["pixel_values"])
    sample = policy.act(inputs)
    assert torch.equal(sample.token_ids, io["tokens"])
    scored = policy.evaluate(inputs, io["tokens"])
    assert gap(scored.logprobs, policy.evaluate(inputs_of(io), io["tokens"]).logprobs) <= 1e-5
    assert gap(sample.logprobs, scored.logprobs) <= 1e-5
    assert gap(policy.action_logits(inputs, io["tokens"])[0], io["tf_action_logits"]) <= 5e-5


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pixels_are_equal_to_the_last_bit(index: int) -> None:
    data = load("preproc")
    resized = resize_naive(data[f"image{index}"][None], 224)
    pixels = normalise_pixels(resized, (IMAGENET_MEAN, HALF), (IMAGENET_STD, HALF))
    assert torch.equal(pixels[0], torch.from_numpy(data[f"pixel{index}"]))


@pytest.mark.parametrize("name", ["wide", "square", "noise", "up"])
def test_frames_go_the_way_of_the_training_data(name: str) -> None:
    recorded = load("rlds_frames")
    frame, stored, cropped = (recorded[f"{name}_{stage}"] for stage in ("frame", "stored", "cropped"))
    size = len(stored)
    ours = as_in_rlds(frame[None], size)[0]
    away = np.abs(ours.astype(int) - stored)
    assert away.max() <= 1 and (away > 0).mean() < 1e-3  # ties of float32
    # Stage by stage, so that a tie is not carried on; then both, as a policy is configured.
    assert np.array_equal(center_crop(stored[None])[0], cropped)
    sizes = {
        "image_size": size,
        "towers": ({"kind": "conv", "stages": [{"channels": 8, "kernel": 2, "stride": 2}]},) * 2,
    }
    config = OpenVLAConfig.model_validate({**sizes, "rlds_frames": True, "center_crop": True})
    assert np.array_equal(fit_frames(frame[None], config)[0], center_crop(ours[None])[0])


def test_default_statistics_are_the_released_ones() -> None:
    # the release was converted under bf16, and its saved statistics are the rounded ones
    config = OpenVLAConfig.openvla_7b()
    assert config.image_mean == (tuple(torch.tensor(IMAGENET_MEAN).bfloat16().tolist()), HALF)
    assert config.image_std == (tuple(torch.tensor(IMAGENET_STD).bfloat16().tolist()), HALF)


def test_action_tokens_round_trip() -> None:
    data = load("action_tokens")
    assert np.array_equal(tokens_from_unit(data["action"], 32000), data["token"])
    assert np.array_equal(unit_from_tokens(data["token"], 32000), data["decoded"])


def test_statistics_unmasked_dimension_passes_through(folder: Path) -> None:
    stats = official_stats(folder, "tiny_a")
    assert isinstance(stats, ActionStats)
    assert stats.unnormalise(np.full(7, 0.25))[6] == 0.25  # the gripper


def test_separate_critic_starts_from_the_official_trunk(folder: Path, io: dict[str, torch.Tensor]) -> None:
    policy = OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS, critic="separate")
    assert policy.critic is not None
    ours = dict(policy.critic.named_parameters())
    assert torch.equal(ours["projector.fc3.weight"], policy.projector.fc3.weight)
    assert torch.equal(
        ours["model.layers.1.mlp.up_proj.weight"], policy.language_model.model.layers[1].mlp.up_proj.weight
    )
    sample = policy.act(inputs_of(io))
    assert torch.equal(sample.token_ids, io["tokens"])
    assert torch.equal(sample.values, torch.zeros(3))


def test_keys_must_be_complete_and_known(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    shutil.copy(DATA / "config.json", tmp_path)
    del weights["vision_backbone.featurizer.blocks.2.attn.qkv.bias"]
    weights["vision_backbone.featurizer.blocks.3.surprise"] = np.zeros(1, np.float32)  # dead block: skipped
    weights["language_model.surprise"] = np.zeros(1, np.float32)
    weights["projector.fc2.bias"] = np.zeros(5, np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        OpenVLAPolicy.load_official(tmp_path, dataset="tiny_a", tower_heads=HEADS)
    message = str(caught.value)
    assert "1 missing: vision_backbone.featurizer.blocks.2.attn.qkv.bias" in message
    assert "1 unexpected: language_model.surprise" in message
    assert "projector.fc2.bias (stored [5], expected [32])" in message


def test_unknown_towers_and_missing_tokenizer_are_named(folder: Path, policy: OpenVLAPolicy) -> None:
    with pytest.raises(CheckpointError, match="vit_tinydino"):
        OpenVLAPolicy.load_official(folder)
    with pytest.raises(CheckpointError, match=r"tiny_a.*tiny_b"):
        OpenVLAPolicy.load_official(folder, tower_heads=HEADS, dataset="libero")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        policy.encode_prompts(("push the puck",))


def _entry(**changes: object) -> dict[str, object]:
    return {"tiny": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, **changes}}}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, r"lacks `means` or `stds`"),
        ("preprocessor_config.json", {"means": 3, "stds": [[0.5] * 3] * 2}, r"image_mean"),
        ("dataset_statistics.json", _entry(q01=[float("nan")] * 7), r"'tiny'.*not finite"),
        ("dataset_statistics.json", _entry(q01=[-1.0] * 6), r"'tiny'.*one length"),
        ("dataset_statistics.json", {"tiny": {"proprio": {}}}, r"'tiny'.*KeyError\('action'\)"),
        ("dataset_statistics.json", {"tiny": None}, r"'tiny'"),
    ],
)
def test_damaged_files_beside_the_weights_are_named(
    folder: Path, tmp_path: Path, name: str, content: object, says: str
) -> None:
    whole = shutil.copytree(folder, tmp_path / "copy")
    (whole / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=says) as caught:
        OpenVLAPolicy.load_official(whole, dataset="tiny", tower_heads=HEADS)
    assert str(whole) in str(caught.value)


def test_a_checkpoint_may_hold_no_statistics(folder: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(folder, tmp_path / "copy")
    raw = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(raw | {"norm_stats": None}))
    policy = OpenVLAPolicy.load_official(whole, tower_heads=HEADS)
    assert policy.num_action_tokens == 7
    with pytest.raises(CheckpointError, match="no action statistics named 'bridge_orig'"):
        OpenVLAPolicy.load_official(whole, dataset="bridge_orig", tower_heads=HEADS)


def test_sharded_weights_load_alike(folder: Path, policy: OpenVLAPolicy, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    shutil.copy(DATA / "config.json", tmp_path)
    names = sorted(weights)
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(index.values())):
        save_file({name: weights[name] for name in names if index[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    other = OpenVLAPolicy.load_official(tmp_path, dataset="tiny_a", tower_heads=HEADS)
    for key, value in policy.state_dict().items():
        if not key.startswith("value_head."):
            assert torch.equal(other.state_dict()[key], value), key
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        OpenVLAPolicy.load_official(tmp_path, tower_heads=HEADS)
