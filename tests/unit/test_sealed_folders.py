"""Folders of weights: altered files are refused by name, and so are numbers that are not finite and odd indices."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_policy import adapted, foreign, unseal

from reachrl.errors import CheckpointError
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.storage.weights import weight_files
from reachrl.rewards.process.base import load_reward_model
from reachrl.rewards.process.pretrained import read_weights
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.run.checkpoint import save_checkpoint, verify_checkpoint
from reachrl.run.manifest import seal, verify, verify_if_sealed
from reachrl.run.stored_weights import check_finite


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture
def policy(base: Path, tmp_path: Path) -> Path:
    OpenVLAPolicy.from_pretrained(base).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> Path:
    adapted(base, critic="adapter").save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    model = SmallRewardModel(image_size=32, channels=(8, 16, 16, 16), hidden=16, instructions=["open the door"])
    model.save_pretrained(tmp_path / "reward_model")
    return tmp_path / "reward_model"


@pytest.mark.parametrize("kind", ["policy", "adapters", "reward_model"])
def test_a_flipped_bit_in_any_file_is_refused_by_name(kind, request):
    folder = request.getfixturevalue(kind)
    load = load_reward_model if kind == "reward_model" else OpenVLAPolicy.from_pretrained
    load(folder)
    (folder / "README.md").write_text("how it was trained")
    load(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    assert {path.suffix for path in files} >= {".json", ".safetensors"}
    for file in files:
        bit = 8 * (file.stat().st_size // 2) + 1
        flip(file, bit)
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            load(folder)
        flip(file, bit)
    load(folder)


def test_digests_are_those_of_the_files(policy):
    listed = json.loads((policy / "manifest.json").read_text())["files"]
    assert set(listed) == {path.name for path in policy.iterdir()} - {"manifest.json"}
    for name, entry in listed.items():
        content = (policy / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_bits_of_every_file_count_but_those_of_a_base_that_may_move(tmp_path):
    (tmp_path / "weights").write_bytes(b"x" * 9)
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "base_model_name_or_path": "here"}')
    seal(tmp_path, step=7)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        place = range(8 * content.find(b"here"), 8 * (content.find(b"here") + 4)) if b"here" in content else ()
        for bit in range(0, 8 * len(content), 19):  # every place of a byte comes
            flip(file, bit)
            if bit not in place:
                with pytest.raises(CheckpointError, match=file.name):
                    verify_if_sealed(tmp_path)
            file.write_bytes(content)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "r": 3}')
    assert verify(tmp_path, remedy="")["step"] == 7


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 9])
def test_a_manifest_cut_short_is_no_licence(policy, content):
    (policy / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        OpenVLAPolicy.from_pretrained(policy)


def test_another_tools_manifest_is_let_be(policy):
    (policy / "manifest.json").write_text('{"name": "demo", "icons": []}')
    OpenVLAPolicy.from_pretrained(policy)


def test_a_checkpoint_lists_what_is_sealed_inside_once_and_still_sees_it_altered(policy, tmp_path):
    def fill(folder: Path) -> None:
        OpenVLAPolicy.from_pretrained(policy).save_pretrained(folder / "policy")
        (folder / "state.json").write_text("{}")

    path = save_checkpoint(tmp_path / "checkpoints", 3, fill)
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {"policy/manifest.json", "state.json"}
    verify_checkpoint(path)
    flip(path / "policy" / "model.safetensors", 99_999)
    verify_checkpoint(path, nested=False)
    with pytest.raises(CheckpointError, match=r"policy/model\.safetensors was altered"):
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"policy/model\.safetensors was altered"):
        OpenVLAPolicy.from_pretrained(policy).restore(path / "policy")


def test_a_manifest_of_an_earlier_version_still_counts(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    entry = {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}  # FIPS 180-2
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 1, "files": {"weights": entry}}))
    assert verify(tmp_path, remedy="")["step"] == 1
    (tmp_path / "weights").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=r"weights was altered.*copy"):
        verify(tmp_path, remedy="copy")


# --- numbers ----------------------------------------------------------------------------------------------------


def poison(file: Path, part: str, value: float) -> str:
    """One number of one tensor whose name holds `part`; returns the name."""
    state = load_file(file)
    name = next(name for name in sorted(state) if part in name and state[name].is_floating_point())
    state[name].view(-1)[-1] = value
    save_file(state, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["vision_backbone", "up_proj", "value_head"])
def test_weights_that_are_no_numbers_are_refused(policy, part, value):
    name = poison(unseal(policy) / "model.safetensors", part, value)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the weight {name} .*not finite"):
        OpenVLAPolicy.from_pretrained(policy)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "value_head.safetensors"])
def test_nor_adapters(adapters, file):
    name = poison(unseal(adapters) / file, "", float("nan"))
    with pytest.raises(CheckpointError, match=rf"{file}: the weight {name} .*not finite"):
        OpenVLAPolicy.from_pretrained(adapters)


def test_nor_adapters_of_another_tool_folded_into_weights(base, tmp_path):
    poison(foreign(base, tmp_path / "foreign") / "adapter_model.safetensors", "lora_A", float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        OpenVLAPolicy(
            OpenVLAPolicy.from_pretrained(base).config.model_copy(update={"checkpoint": tmp_path / "foreign"})
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_type_and_every_place(dtype):
    for place in (0, 4097, 9999):
        tensor = torch.linspace(-400, 400, 10_000).to(dtype)
        check_finite(tensor, "w", Path("f"))
        tensor.view(torch.uint8 if dtype.itemsize == 1 else dtype)[place] = 0x7F if dtype.itemsize == 1 else torch.nan
        with pytest.raises(CheckpointError, match="f: the weight w"):
            check_finite(tensor, "w", Path("f"))
    check_finite(torch.zeros(0), "w", Path("f"))
    check_finite(torch.arange(3), "w", Path("f"))


# --- indices ----------------------------------------------------------------------------------------------------


def sharded(folder: Path, name: str) -> Path:
    """A folder whose index names one file."""
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    return folder


@pytest.mark.parametrize("name", ["../x.safetensors", "{tmp}/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    for place in (tmp_path, tmp_path / "model" / "sub"):
        place.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.zeros(1)}, place / "x.safetensors")
    folder = sharded(tmp_path / "model" / "m", name.replace("{tmp}", str(tmp_path)))
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=r"index\.json names .*expected plain names"):
        weight_files(folder)
    with pytest.raises(CheckpointError, match=r"index\.json names .*expected plain names"):
        read_weights(None, folder, dtype="auto")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "blob")
    folder = sharded(tmp_path / "snapshot", "x.safetensors")
    os.symlink("../blob", folder / "x.safetensors")
    assert weight_files(folder) == [folder / "x.safetensors"]
