"""Weights under Prismatic's own names, and what is refused: two names for one weight, pickles, other layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official_folder import HEADS, read, to_native, write_official
from safetensors.numpy import load_file, save_file

from reachrl.errors import CheckpointError
from reachrl.policies.openvla.names import canonical_key
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.storage.weights import read_shapes


@pytest.mark.parametrize(
    ("stored", "official"),
    [
        ("vision_backbone.dino_featurizer.cls_token", "vision_backbone.featurizer.cls_token"),
        ("vision_backbone.siglip_featurizer.norm.bias", "vision_backbone.fused_featurizer.norm.bias"),
        ("vision_backbone.dino_featurizer.blocks.7.ls2.gamma", "vision_backbone.featurizer.blocks.7.ls2.scale_factor"),
        ("vision_backbone.featurizer.blocks.0.ls1.gamma", "vision_backbone.featurizer.blocks.0.ls1.scale_factor"),
        ("projector.projector.0.weight", "projector.fc1.weight"),
        ("projector.2.bias", "projector.fc2.bias"),
        ("projector.projector.4.weight", "projector.fc3.weight"),
        ("llm_backbone.llm.model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("llm.lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_native_names_become_official(stored: str, official: str) -> None:
    assert canonical_key(stored) == canonical_key(official) == official


@pytest.mark.parametrize(
    "key",
    [
        "value_head.fc1.weight",
        "critic.projector.fc1.weight",
        "critic.model.layers.0.ls1.gamma",  # LayerScale is a matter of the towers
        "vision_backbone.featurizer.stages.0.gamma",
        "vision_backbone.fused_featurizer.blocks.10.attn.proj.weight",
        "projector.fc1.weight",
        "projector.projector.1.weight",
        "base_model.model.llm.lm_head.weight",
        "",
    ],
)
def test_other_names_stay(key: str) -> None:
    assert canonical_key(key) == key


def test_a_folder_with_native_names_loads_alike(tmp_path: Path) -> None:
    keys = set(read("model"))
    assert len({to_native(key) for key in keys} - keys) == len(keys)  # every single one is named otherwise
    official = OpenVLAPolicy.load_official(write_official(tmp_path / "a"), dataset="tiny_a", tower_heads=HEADS)
    folder = write_official(tmp_path / "b", to_native)
    assert set(read_shapes(folder, canonical_key)) == keys
    native = OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)
    assert native.config.model_copy(update={"checkpoint": None}) == official.config.model_copy(
        update={"checkpoint": None}
    )
    loaded = native.state_dict()
    for key, value in official.state_dict().items():
        if not key.startswith("value_head."):
            assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("sharded", [False, True])
def test_two_names_for_one_weight_are_both_named(tmp_path: Path, sharded: bool) -> None:
    folder = write_official(tmp_path)
    weights, extra = load_file(folder / "model.safetensors"), {"llm.lm_head.weight": np.zeros((32064, 32), np.float32)}
    if sharded:
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / "a.safetensors")
        save_file(extra, folder / "b.safetensors")
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({**weights, **extra}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)
    for part in ("weight language_model.lm_head.weight twice", "as llm.lm_head.weight", str(folder)):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["latest-checkpoint.pt", "pytorch_model-00001-of-00002.bin", "checkpoints/step-9.pt"])
def test_pickles_are_refused_without_being_opened(tmp_path: Path, name: str) -> None:
    folder = write_official(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that would run a command
    OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)  # beside safetensors it does not matter
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)
    for part in (name, "never opened", "safetensors.torch.save_file"):
        assert part in str(caught.value)


@pytest.mark.parametrize("config", [{"vla": {"base_vlm": "prism"}}, {"model": {"vision_backbone_id": "dinosiglip"}}])
def test_prismatics_own_configuration_is_told_apart(tmp_path: Path, config: dict[str, object]) -> None:
    folder = write_official(tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json is Prismatic's own.*model_type"):
        OpenVLAPolicy.load_official(folder, tower_heads=HEADS)


def test_the_resize_strategy_is_read(tmp_path: Path) -> None:
    for strategy in ("resize-naive", "letterbox"):
        folder = write_official(tmp_path, image_resize_strategy=strategy)
        assert OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS).config.resize == strategy
    folder = write_official(tmp_path, image_resize_strategy="resize-crop")
    with pytest.raises(CheckpointError, match=r"'resize-crop' is not supported, expected one of resize-naive, letterb"):
        OpenVLAPolicy.load_official(folder, dataset="tiny_a", tower_heads=HEADS)
