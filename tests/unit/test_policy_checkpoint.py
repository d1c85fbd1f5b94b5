"""Saving and loading a policy: equal afterwards, complete or absent, clear about what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_policy import unseal

from reachrl.config.policy import OpenVLAConfig
from reachrl.config.towers import ConvStage
from reachrl.errors import CheckpointError, StorageError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.storage import saved
from reachrl.types import Observation


def micro(**changes: object) -> OpenVLAConfig:
    sizes: dict[str, object] = {
        "image_size": 16,
        "towers": ({"kind": "conv", "stages": [{"channels": 8, "kernel": 8, "stride": 8}]},),
        "image_mean": ((0.5, 0.5, 0.5),),
        "image_std": ((0.5, 0.5, 0.5),),
        "language_model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "value_hidden_size": 8,
    }
    return OpenVLAConfig.model_validate({**sizes, **changes})


@pytest.fixture
def policy() -> OpenVLAPolicy:
    torch.manual_seed(0)
    policy = OpenVLAPolicy(micro(critic="separate"))
    with torch.no_grad():
        policy.value_head.fc2.weight.normal_()
        policy.critic.model.norm.weight.mul_(2)
    policy.set_action_stats(np.array([-0.1, 0.1 + 0.2, -1, -1]), np.array([0.3, 1 / 3, 1, 1]), np.array([1, 1, 0, 1]))
    return policy


def observe() -> Observation:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return Observation(images={"camera": images}, instructions=("push the puck", "close the drawer", "open the window"))


def test_round_trip_is_exact(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "policy")
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [
        "config.json",
        "dataset_statistics.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    other = OpenVLAPolicy.from_pretrained(tmp_path / "policy")
    assert other.architecture() == policy.architecture()
    ours, theirs = policy.act(policy.encode(observe())), other.act(other.encode(observe()))
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert torch.equal(ours.values, theirs.values) and ours.values.abs().min() > 0
    assert np.array_equal(policy.decode_actions(ours.token_ids), other.decode_actions(theirs.token_ids))
    assert np.array_equal(other.action_stats.q01, policy.action_stats.q01)


def test_configured_checkpoint_is_loaded(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "policy")
    other = OpenVLAPolicy(policy.config.model_copy(update={"checkpoint": tmp_path / "policy"}))
    for key, value in policy.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    other.save_pretrained(tmp_path / "again")
    (tmp_path / "policy" / "model.safetensors").unlink()
    OpenVLAPolicy.from_pretrained(tmp_path / "again")  # depends on no earlier folder


def test_saving_again_replaces_and_leaves_nothing_behind(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "policy")
    with torch.no_grad():
        policy.value_head.fc2.bias.fill_(7)
    policy.save_pretrained(tmp_path / "policy")
    assert OpenVLAPolicy.from_pretrained(tmp_path / "policy").value_head.fc2.bias.item() == 7
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["plain", "wrapped"],
)
def test_a_full_disk_keeps_what_was_there(
    policy: OpenVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    policy.save_pretrained(tmp_path / "policy")

    def full(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        policy.save_pretrained(tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    OpenVLAPolicy.from_pretrained(tmp_path / "policy")


def test_a_refused_rename_keeps_what_was_there(
    policy: OpenVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.save_pretrained(tmp_path / "policy")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if (self / "config.json").is_file() and target == tmp_path / "policy" and "tmp" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(StorageError, match="Input/output error"):
        policy.save_pretrained(tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    OpenVLAPolicy.from_pretrained(tmp_path / "policy")


def test_missing_and_truncated_files(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    with pytest.raises(CheckpointError, match="does not exist"):
        OpenVLAPolicy.from_pretrained(folder)
    for name in ("config.json", "dataset_statistics.json", "model.safetensors"):
        policy.save_pretrained(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=name):
            OpenVLAPolicy.from_pretrained(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            OpenVLAPolicy.from_pretrained(folder)
    policy.save_pretrained(folder)
    unseal(folder)
    (folder / "tokenizer.json").write_text("{}")
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "tokenizer": "folder"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        OpenVLAPolicy.from_pretrained(folder)


def test_another_architecture_is_named_field_by_field(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "policy")
    changed = micro(checkpoint=tmp_path / "policy", value_hidden_size=4, critic="separate", image_size=32)
    with pytest.raises(CheckpointError) as caught:
        OpenVLAPolicy(changed)
    assert "value_hidden_size (checkpoint 8, configured 4)" in str(caught.value)
    assert "image_size (checkpoint 16, configured 32)" in str(caught.value)
    assert "num_layers" not in str(caught.value)
    # what changes no weight may differ
    OpenVLAPolicy(policy.config.model_copy(update={"checkpoint": tmp_path / "policy", "prompt_length": 40}))


def test_weights_that_do_not_fit_are_listed(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    policy.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["projector.extra"] = torch.zeros(1)
    weights["projector.fc1.bias"] = torch.zeros(3)
    del weights["value_head.fc1.weight"]
    save_file(weights, unseal(folder) / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        OpenVLAPolicy.from_pretrained(folder)
    for part in ("1 missing: value_head.fc1.weight", "1 unexpected: projector.extra", "projector.fc1.bias (stored [3]"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "image_size"),
        ({"towers": ()}, "at least 1"),
        ({"image_mean": ()}, "1 towers"),
        ({"language_model": {"hidden_size": 30}}, "divide"),
        ({"towers": ({"kind": "conv", "stages": [{"channels": 12}]},)}, "multiple of 8"),
        ({"towers": ({"kind": "convolution"},)}, "conv"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        micro(**changes)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (8, 4), (4, 4), (3, 2), (5, 2), (4, 2), (3, 1), (6, 3)])
def test_convolutions_keep_the_announced_grid(kernel: int, stride: int) -> None:
    stage = ConvStage(channels=8, kernel=kernel, stride=stride)
    config = micro(image_size=24, towers=({"kind": "conv", "stages": [stage.model_dump()]},))
    policy = OpenVLAPolicy(config)
    with torch.no_grad():
        features = policy.vision_features(torch.zeros(1, 3, 24, 24))
    assert features.shape == (1, config.num_patches, 8) == (1, (24 // stride) ** 2, 8)


def test_the_released_size_has_the_released_number_of_weights() -> None:
    with torch.device("meta"):
        policy = OpenVLAPolicy(OpenVLAConfig.openvla_7b(tokenizer="folder"))
    live = sum(parameter.numel() for role in ("vision", "trunk") for parameter in policy.parameter_groups()[role])
    assert live == 7_498_156_704  # of 7,541,237,184 in the release; the rest is never read


def test_frames_made_square_in_another_way_are_warned_of(policy: OpenVLAPolicy, tmp_path: Path, caplog) -> None:
    policy.save_pretrained(tmp_path / "policy")
    changes = {"checkpoint": tmp_path / "policy", "resize": "letterbox"}
    OpenVLAPolicy(policy.config.model_copy(update=changes))
    assert "made by policy.resize=resize-naive, configured is letterbox" in caplog.text
    caplog.clear()
    OpenVLAPolicy.from_pretrained(tmp_path / "policy")
    assert not caplog.text


def test_integers_are_no_weights(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    """An 8-bit checkpoint stores weights under their names and in their shapes."""
    policy.save_pretrained(tmp_path / "policy")
    unseal(tmp_path / "policy")
    file = tmp_path / "policy" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as int8"):
        OpenVLAPolicy.from_pretrained(tmp_path / "policy")


@pytest.mark.parametrize(
    ("q99", "mask", "problem"),
    [([1e39, 1.0], [True, True], "not finite"), ([1.0, 1.0], np.array(["false", "true"]), "must be booleans")],
)
def test_action_statistics_that_decode_to_nothing(q99: list[float], mask: list | np.ndarray, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ActionStats.create([0.0, 0.0], q99, mask)
