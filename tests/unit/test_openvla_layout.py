"""The released 7B layout, weight by weight, on the meta device and in a file of headers."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from official_folder import DATA

from reachrl.config.policy import OpenVLAConfig
from reachrl.errors import CheckpointError
from reachrl.policies.openvla.inspection import CheckpointInfo, inspect_folder
from reachrl.policies.openvla.official import is_dead
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.storage.weights import check_shapes

STORED, LIVE = 7_541_237_184, 7_498_156_704
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tower(prefix: str, width: int, depth: int, mlp: int, *, layer_scale: bool) -> Shapes:
    """Patches of 14 pixels from 224, blocks and final norm: what both towers have."""
    shapes: Shapes = {
        f"{prefix}.pos_embed": (1, 256, width),
        f"{prefix}.patch_embed.proj.weight": (width, 3, 14, 14),
        f"{prefix}.patch_embed.proj.bias": (width,),
        **norm(f"{prefix}.norm", width),
    }
    for i in range(depth):
        block = f"{prefix}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", mlp, width) | linear(f"{block}.mlp.fc2", width, mlp)
        if layer_scale:
            shapes |= {f"{block}.ls1.scale_factor": (width,), f"{block}.ls2.scale_factor": (width,)}
    return shapes


def released() -> Shapes:
    """Every weight of the release with its shape."""
    dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    shapes = tower(dino, 1024, 24, 4096, layer_scale=True) | tower(siglip, 1152, 27, 4304, layer_scale=False)
    shapes |= {f"{dino}.cls_token": (1, 1, 1024), f"{dino}.reg_token": (1, 4, 1024)}
    pool = f"{siglip}.attn_pool"
    shapes |= {f"{pool}.latent": (1, 1, 1152)} | linear(f"{pool}.q", 1152, 1152) | linear(f"{pool}.kv", 2304, 1152)
    shapes |= linear(f"{pool}.proj", 1152, 1152) | norm(f"{pool}.norm", 1152)
    shapes |= linear(f"{pool}.mlp.fc1", 4304, 1152) | linear(f"{pool}.mlp.fc2", 1152, 4304)
    shapes |= linear("projector.fc1", 8704, 2176) | linear("projector.fc2", 4096, 8704)
    shapes |= linear("projector.fc3", 4096, 4096)
    llama = "language_model.model"
    shapes |= {f"{llama}.embed_tokens.weight": (32064, 4096), f"{llama}.norm.weight": (4096,)}
    for i in range(32):
        layer = f"{llama}.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (4096, 11008)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return shapes | {"language_model.lm_head.weight": (32064, 4096)}


def total(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def test_every_weight_of_the_release_is_accounted_for() -> None:
    config = OpenVLAConfig.openvla_7b()
    with torch.device("meta"):
        policy = OpenVLAPolicy(config)
    own = {key: tuple(value.shape) for key, value in policy.state_dict().items() if not key.startswith("value_head.")}
    official = released()
    dead = {key: shape for key, shape in official.items() if is_dead(key, config)}
    assert total(official) == STORED
    assert {key: shape for key, shape in official.items() if key not in dead} == own and total(own) == LIVE
    # the last block, the final norm and the pooling, and of one block everything
    places = {key.split(".", 2)[1] + "." + ".".join(key.split(".")[2:4]) for key in dead if ".blocks." in key}
    assert places == {"featurizer.blocks.23", "fused_featurizer.blocks.26"}
    assert sum(".blocks." in key for key in dead) == 14 + 12
    assert sum(key.split(".")[2] == "norm" for key in dead) == 4
    assert sum(".attn_pool." in key for key in dead) == 13 and len(dead) == 26 + 4 + 13

    def dies(key: str) -> bool:
        return is_dead(key, config)

    check_shapes(own, official, Path("release"), skipped=dies)
    with pytest.raises(CheckpointError, match="43 unexpected"):
        check_shapes(own, official, Path("release"))


@pytest.fixture
def headers_alone(tmp_path: Path) -> Iterator[Path]:
    """A folder of the released size whose weights were never written: headers in front of a hole."""
    config = json.loads((DATA / "config.json").read_text())
    for default in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        del config["text_config"][default]  # as the release, which leaves out what equals Llama-2's
    config["timm_model_ids"] = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    config["image_sizes"] = [224, 224]
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for key, shape in released().items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    yield tmp_path
    path.unlink()  # a copy of the temporary folder would fill the hole


def test_a_folder_of_the_released_size_is_described_from_its_headers(headers_alone: Path) -> None:
    found = inspect_folder(headers_alone)
    assert isinstance(found, CheckpointInfo)
    assert (found.num_weights, found.num_live, found.dtypes) == (STORED, LIVE, {"BF16": STORED})
    assert (found.layout, found.heads_known) == ("official", True)
    official = released()
    for part, prefix in {
        "tower 1": "vision_backbone.featurizer.",
        "tower 2": "vision_backbone.fused_featurizer.",
        "projector": "projector.",
        "language model": "language_model.",
    }.items():
        [counted] = [entry for entry in found.parts if entry.name == part]
        assert counted.num_weights == total({key: shape for key, shape in official.items() if key.startswith(prefix)})
    # the sizes that were read off the headers are those of the configuration in the package
    released_config = OpenVLAConfig.openvla_7b()
    assert (found.config.towers, found.config.language_model) == (
        released_config.towers,
        released_config.language_model,
    )
    # 0.524 MB for each of 256 patches, 32 prompt tokens and the 6 action tokens that are fed back
    assert found.sequence_length == 294
    assert found.num_cached * 2 == 294 * 32 * 2 * 4096 * 2
