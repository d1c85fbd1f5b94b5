"""What the files of an official checkpoint say is adopted, or refused: nothing of it is silently left out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from official_folder import DATA, HEADS, read, write_official
from safetensors.numpy import load_file, save_file
from small_policy import foreign
from tokenizers import Tokenizer, models, pre_tokenizers

from reachrl.config.language_model import LoRAConfig
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.config.policy import OpenVLAConfig
from reachrl.errors import CheckpointError
from reachrl.policies.openvla import oft
from reachrl.policies.openvla.export import export_merged
from reachrl.policies.openvla.inspection import CheckpointInfo, inspect_folder
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.storage import read_config
from reachrl.policies.openvla.verify import verify
from reachrl.policies.openvla_oft.unstated import check_given
from reachrl.policies.storage.published import Published

RAW = json.loads((DATA / "config.json").read_text())
STATS = RAW["norm_stats"]["tiny_a"]
RELEASED = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
PREPROCESSOR = {
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 56, 56]] * 2,
    "interpolations": ["bicubic"] * 2,
    "means": [[0.1, 0.2, 0.3], [0.5] * 3],
    "stds": [[0.9, 0.8, 0.7], [0.5] * 3],
}
MEANS, STDS = ((0.1, 0.2, 0.3), (0.5,) * 3), ((0.9, 0.8, 0.7), (0.5,) * 3)


def put(folder: Path, name: str, content: object) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


def load(folder: Path, dataset: str | None = "tiny_a") -> OpenVLAPolicy:
    return OpenVLAPolicy.load_official(folder, dataset=dataset, tower_heads=HEADS)


def configured(folder: Path, **changes: object) -> OpenVLAConfig:
    """A policy section that names the folder and leaves the pixel statistics at their defaults."""
    sizes = read_config(folder, HEADS).model_dump(exclude={"image_mean", "image_std"})
    return OpenVLAConfig.model_validate(sizes | {"dataset": "tiny_a"} | changes)


def without(folder: Path, *prefixes: str) -> Path:
    """The folder with all weights of these names taken out."""
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith(prefixes)}, folder / "model.safetensors")
    return folder


# --- frames -----------------------------------------------------------------------------------------------------


def test_saved_pixel_statistics_win_and_are_saved(tmp_path: Path, caplog) -> None:
    folder = put(write_official(tmp_path / "a"), "preprocessor_config.json", PREPROCESSOR)
    policy = OpenVLAPolicy(configured(folder))
    assert (policy.config.image_mean, policy.config.image_std) == (MEANS, STDS)
    assert "was trained on pixels normalised by" in caplog.text and "0.484375" in caplog.text
    policy.save_pretrained(tmp_path / "saved")
    again = OpenVLAPolicy.from_pretrained(tmp_path / "saved")
    assert (again.config.image_mean, again.config.image_std) == (MEANS, STDS)
    policy.restore(tmp_path / "saved")
    caplog.clear()
    load(folder)  # reads them into its configuration
    OpenVLAPolicy(configured(write_official(tmp_path / "b"), image_mean=MEANS))  # none are saved: the configured hold
    assert not caplog.text


def test_adapters_keep_the_pixel_statistics_they_were_trained_with(tmp_path: Path) -> None:
    folder = put(write_official(tmp_path / "a"), "preprocessor_config.json", PREPROCESSOR)
    policy = OpenVLAPolicy(configured(folder, lora={"rank": 2}))
    policy.save_pretrained(tmp_path / "saved")
    put(folder, "preprocessor_config.json", PREPROCESSOR | {"means": [[0.4] * 3] * 2})
    assert OpenVLAPolicy.from_pretrained(tmp_path / "saved").config.image_mean == MEANS
    sizes = configured(folder).model_dump() | {"checkpoint": tmp_path / "saved"}
    assert OpenVLAPolicy(OpenVLAConfig.model_validate(sizes)).config.image_mean == MEANS


def test_the_preprocessors_resizing_counts(tmp_path: Path) -> None:
    folder = put(write_official(tmp_path), "preprocessor_config.json", PREPROCESSOR)
    put(folder, "config.json", RAW | {"image_resize_strategy": "letterbox"})
    assert read_config(folder, HEADS).resize == "resize-naive"
    silent = {key: value for key, value in PREPROCESSOR.items() if key != "image_resize_strategy"}
    assert read_config(put(folder, "preprocessor_config.json", silent), HEADS).resize == "letterbox"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_resize_strategy": "resize-crop"}, "'resize-crop' is not supported"),
        ({"interpolations": ["bicubic", "bilinear"]}, "interpolations = .*expected 'bicubic'"),
        ({"input_sizes": [[3, 224, 224]] * 2}, r"input_sizes = .*expected \[3, 56, 56\]"),
        ({"means": [[float("nan")] * 3] * 2}, "means = .*cannot normalise"),
        ({"stds": [[0.5, 0.0, 0.5]] * 2}, "stds = .*above 0"),
        ({"means": "x"}, "means = 'x'"),
        ({"means": [[0.5] * 3]}, "2 towers"),
    ],
)
def test_frames_that_cannot_be_made_are_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    folder = put(write_official(tmp_path), "preprocessor_config.json", PREPROCESSOR | changes)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


# --- action statistics ------------------------------------------------------------------------------------------


def test_one_of_several_statistics_must_be_named_before_the_first_action(tmp_path: Path) -> None:
    policy = load(write_official(tmp_path / "a"), dataset=None)  # enough to look inside, or to set others
    tokens = torch.full((1, 7), 31800)
    for use in (
        lambda: policy.decode_actions(tokens),
        lambda: policy.encode_actions(np.zeros((1, 1, 7))),
        lambda: policy.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(CheckpointError, match=r"2 sets.*\['tiny_a', 'tiny_b'\].*policy\.dataset"):
            use()
    assert not (tmp_path / "saved").exists()
    policy.set_action_stats(-np.ones(7), np.ones(7), np.ones(7, bool))  # as supervised training does
    assert np.abs(policy.decode_actions(tokens)).max() < 1


def test_the_only_statistics_beside_the_configuration_are_preferred(tmp_path: Path) -> None:
    folder = put(write_official(tmp_path), "dataset_statistics.json", {"lab": STATS})
    assert load(folder, dataset=None).action_stats.q01.tolist() == STATS["action"]["q01"]
    named = load(folder, dataset="tiny_b")
    assert named.action_stats.q01.tolist() == RAW["norm_stats"]["tiny_b"]["action"]["q01"]


def test_a_named_set_decides_the_number_of_action_tokens(tmp_path: Path) -> None:
    six = {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6}}
    folder = put(write_official(tmp_path), "dataset_statistics.json", {"six": six, "other": STATS})
    assert load(folder, "six").num_action_tokens == 6
    assert load(folder, "other").num_action_tokens == load(folder, "tiny_a").num_action_tokens == 7


@pytest.mark.parametrize(
    "action",
    [
        {**STATS["action"], "q99": [1.0] * 6},
        {**STATS["action"], "q99": [float("nan")] * 7},
        {**STATS["action"], "q99": ["x"] * 7},
        {**STATS["action"], "mask": None},
        {"q01": [0.0] * 7},
        None,
        [],
    ],
)
def test_damaged_statistics_are_named(tmp_path: Path, action: object) -> None:
    folder = put(write_official(tmp_path), "dataset_statistics.json", {"lab": {"action": action}})
    for look in (lambda: load(folder, "lab"), lambda: inspect_folder(folder)):
        with pytest.raises(CheckpointError, match="statistics 'lab' .* are damaged"):
            look()


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json"])
def test_statistics_that_are_no_sets_are_refused(tmp_path: Path, name: str) -> None:
    content = RAW | {"norm_stats": [1]} if name == "config.json" else [1]
    with pytest.raises(CheckpointError, match=rf"{name} holds a"):
        load(put(write_official(tmp_path), name, content), None)


# --- tokenizer --------------------------------------------------------------------------------------------------

WORDS = {word: place + 3 for place, word in enumerate("In : What action should the robot take to".split())}
LLAMA = {"<unk>": 0, "<s>": 1, "</s>": 2, **WORDS, "▁": 29871}


def tokenizer(vocabulary: dict[str, int], unknown: str | None = "<unk>") -> str:
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or "nothing"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made.to_str()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (tokenizer({**LLAMA, "<s>": 50}), r"id of '<s>' is 50, expected 1 \(bos_token_id\)"),
        (tokenizer({k: v for k, v in LLAMA.items() if k != "<s>"}), r"id of '<s>' is None"),
        (tokenizer({**LLAMA, "▁": 220}), "id of '▁' is 220, expected 29871"),
        (tokenizer({**LLAMA, "more": 50256}), "last id is 50256, expected at most 32063"),
        (tokenizer({**LLAMA, "block": 31744}), "a prompt has the token 31744, expected none from .* 31744"),
        (tokenizer(LLAMA, unknown=None), "cannot be read"),  # no word for what it does not know
        ("null", "cannot be read"),
    ],
)
def test_a_wrong_tokenizer_is_noticed(tmp_path: Path, text: str, says: str) -> None:
    folder = write_official(tmp_path)
    (folder / "tokenizer.json").write_text(text)
    for look in (lambda: load(folder), lambda: inspect_folder(folder)):
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json .*{says}"):
            look()


def test_the_right_tokenizer_is_taken(tmp_path: Path) -> None:
    (write_official(tmp_path) / "tokenizer.json").write_text(tokenizer(LLAMA))
    assert load(tmp_path).tokenizer is not None
    found = inspect_folder(tmp_path)
    assert isinstance(found, CheckpointInfo) and found.prompt_ids is not None and found.prompt_ids[-1] == 29871


# --- weights and architecture -----------------------------------------------------------------------------------


def test_missing_last_layers_are_missing_weights(tmp_path: Path) -> None:
    folder = without(write_official(tmp_path), "language_model.model.layers.1.")
    with pytest.raises(CheckpointError, match=r"9 missing: language_model\.model\.layers\.1\.self_attn"):
        load(folder)


def test_released_towers_have_their_depth_whatever_is_stored(tmp_path: Path) -> None:
    folder = write_official(tmp_path, timm_model_ids=RELEASED)
    towers = read_config(folder, HEADS).towers
    assert [tower.depth for tower in towers if tower.kind == "vit"] == [24, 27]
    with pytest.raises(CheckpointError, match=r"missing: vision_backbone\.featurizer\.blocks\.4\."):
        load(folder)


def test_a_missing_tower_is_named(tmp_path: Path) -> None:
    folder = without(write_official(tmp_path), "vision_backbone.fused_featurizer.")
    with pytest.raises(CheckpointError, match=r"it has no 'vision_backbone\.fused_featurizer\.patch_embed"):
        load(folder)


@pytest.mark.parametrize("keys", [("model.embed_tokens",), ("model.embed_tokens", "lm_head")])
def test_a_resized_vocabulary_is_refused(tmp_path: Path, keys: tuple[str, ...]) -> None:
    folder, weights = write_official(tmp_path), read("model")
    for key in keys:
        weights[f"language_model.{key}.weight"] = weights[f"language_model.{key}.weight"][:32000].copy()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight \(stored \[32000, 32\], expected \[32064, 32\]\)"):
        load(folder)
    put(folder, "config.json", RAW | {"text_config": RAW["text_config"] | {"vocab_size": 32000}})
    with pytest.raises(CheckpointError, match="pad_token_id=32000 is no row of the embedding"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_action_bins": 128}, "n_action_bins = 128 is not supported, expected 256"),
        ({"image_sizes": [56, 224]}, r"image_sizes = \[56, 224\]"),
        ({"image_sizes": 56}, "image_sizes = 56"),
        ({"timm_model_ids": None}, "timm_model_ids = None"),
        ({"timm_override_act_layers": [None, "quick_gelu"]}, "override_act_layers = .*'quick_gelu'"),
        ({"timm_model_ids": ["a", "b", "c"]}, "expected one or two towers"),
        ({"text_config": [1]}, "text_config is a list"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu' .* expected 'silu'"),
        ({"text_config": {"model_type": "mistral"}}, "model_type = 'mistral' .* expected 'llama'"),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "rope_scaling = .* expected None"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type .* = 'yarn'"),
        ({"llm_backbone_id": "vicuna-v15-7b"}, "llm_backbone_id = 'vicuna-v15-7b' .*v0.1"),
        ({"text_config": None}, "32 missing|missing: .*layers"),  # Llama-2's 32 layers then
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    folder = write_official(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=says):
        load(folder)
    if changes != {"text_config": None}:  # what is stored is described as it is
        with pytest.raises(CheckpointError, match=says):
            inspect_folder(folder)


@pytest.mark.parametrize("places", [None, [["a", "b"]], {"a": 3}])
def test_a_damaged_index_is_refused(tmp_path: Path, places: object) -> None:
    folder = write_official(tmp_path)
    (folder / "model.safetensors").unlink()
    put(folder, "model.safetensors.index.json", {"weight_map": places})
    with pytest.raises(CheckpointError, match="weight_map is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("raw", "found"), [({"model_type": "llava"}, "'llava'"), ({"model_type": "bert"}, "'bert'"), ({}, "None")]
)
def test_other_models_are_told_apart(tmp_path: Path, raw: dict[str, str], found: str) -> None:
    folder = put(write_official(tmp_path), "config.json", raw)
    for look in (lambda: load(folder), lambda: inspect_folder(folder)):
        with pytest.raises(CheckpointError, match=rf"config\.json: model_type is {found}, expected 'openvla'"):
            look()


def test_key_heads_that_are_all_heads_are_the_same_architecture(tmp_path: Path) -> None:
    """A file may say of every model with plain attention that it has as many key heads as heads."""
    folder = write_official(tmp_path)
    assert RAW["text_config"]["num_key_value_heads"] == RAW["text_config"]["num_attention_heads"] == 4
    sizes = read_config(folder, HEADS).language_model.model_dump()
    for stated in (None, 4):
        policy = OpenVLAPolicy(configured(folder, language_model={**sizes, "num_kv_heads": stated}))
        assert policy.architecture()["language_model"]["num_kv_heads"] is None
    with pytest.raises(CheckpointError, match=r"num_kv_heads \(checkpoint None, configured 2\)"):
        OpenVLAPolicy(configured(folder, language_model={**sizes, "num_kv_heads": 2}))


def test_an_index_that_names_a_weight_of_no_shard_is_refused(tmp_path: Path) -> None:
    folder = write_official(tmp_path)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    names = dict.fromkeys(read("model"), "one.safetensors")
    put(folder, "model.safetensors.index.json", {"weight_map": names})
    assert load(folder).origin == folder
    put(folder, "model.safetensors.index.json", {"weight_map": {**names, "language_model.more": "one.safetensors"}})
    for look in (load, inspect_folder):
        with pytest.raises(CheckpointError, match=r"names weights that no shard holds: language_model\.more"):
            look(folder)


# --- OpenVLA-OFT ------------------------------------------------------------------------------------------------


def leave(name: str, text: str = "") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


SIGNALS = [
    (leave("action_head--150000_checkpoint.pt"), r"the file action_head--150000_checkpoint\.pt"),
    (leave("proprio_projector--latest_checkpoint.pt"), "the file proprio_projector--latest"),
    (leave("noisy_action_projector--5_checkpoint.pt"), "the file noisy_action_projector--5"),
    (leave("vision_backbone--10_checkpoint.pt"), "the file vision_backbone--10"),
    (lambda folder: (folder / "lora_adapter").mkdir(), "the folder lora_adapter"),
    (leave("modeling_prismatic.py", "from c import NUM_ACTIONS_CHUNK\n"), r"NUM_ACTIONS_CHUNK in modeling_prismatic"),
    (lambda folder: put(folder, "config.json", RAW | {"use_proprio": False}), r"use_proprio in config\.json"),
    (leave("action_head.safetensors"), r"the file action_head\.safetensors"),
    (lambda folder: code(folder / "prismatic/vla/constants.py"), r"NUM_ACTIONS_CHUNK in constants\.py"),
    (
        lambda folder: put(folder, "config.json", RAW | {"auto_map": {"AutoModel": "m.OpenVLAOFTForAction"}}),
        r"auto_map in config\.json",
    ),
    (
        lambda folder: put(folder, "config.json", RAW | {"_name_or_path": "moojink/openvla-7b-oft-finetuned"}),
        r"_name_or_path in config\.json",
    ),
]


def code(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("NUM_ACTIONS_CHUNK = 8\n")


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("Openvla-oft-SFT-libero10", "Openvla-oft-SFT-libero10"),
        ("models--RLinf--RLinf-OpenVLAOFT-ManiSkill/snapshots/abc", "models--RLinf--RLinf-OpenVLAOFT-ManiSkill"),
        ("soft-robot", None),
        ("openvla-often", None),
    ],
)
def test_the_name_of_a_checkpoint_may_be_its_only_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, refused: str | None
) -> None:
    monkeypatch.setattr(oft, "published", lambda place: Published())
    folder = write_official(tmp_path / name)
    if refused is None:
        load(folder)
        return
    with pytest.raises(CheckpointError, match=f"OpenVLA-OFT checkpoint by its name, {refused}:.*under another name"):
        load(folder)


@pytest.mark.parametrize(("mark", "says"), SIGNALS)
def test_each_sign_of_openvla_oft_is_named(tmp_path: Path, mark: Callable[[Path], object], says: str) -> None:
    folder = write_official(tmp_path / "checkpoint")
    leave("modeling_prismatic.py", "class OpenVLAForActionPrediction: ...")(folder)  # as plain checkpoints bring it
    assert inspect_folder(folder).oft_signal is None
    mark(folder)
    with pytest.raises(CheckpointError, match=f"OpenVLA-OFT checkpoint by {says}"):
        load(folder)
    signal = inspect_folder(folder).oft_signal
    assert signal is not None and re.search(says, signal)


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        (("action_head--150000_checkpoint.pt",), {}, "the file action_head--150000"),
        (("lora_adapter/adapter_model.bin",), {}, "the file lora_adapter/.* on the hub"),
        (
            (),
            {"modeling_prismatic.py": "import NUM_ACTIONS_CHUNK"},
            "NUM_ACTIONS_CHUNK in",
        ),
        (("README.md", "old/action_head--1_checkpoint.pt"), {"modeling_prismatic.py": "class OpenVLA: ..."}, None),
    ],
)
def test_signs_on_the_hub_that_are_never_downloaded_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], code: dict[str, str], says: str | None
) -> None:
    folder = write_official(tmp_path / "models--me--tiny" / "snapshots" / "0123")
    asked = Published(names=("config.json", *files, *code), code=code)
    monkeypatch.setattr(oft, "published", lambda place: asked if place == folder else Published())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder))
    if says is None:
        assert load(Path("me/tiny")).origin == Path("me/tiny")
        return
    with pytest.raises(CheckpointError, match=f"OpenVLA-OFT checkpoint by {says}"):
        load(Path("me/tiny"))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (
            "action_head--150000_checkpoint.pt",
            r"action_head--150000_checkpoint\.pt on the hub it has a regression head",
        ),
        ("vision_backbone--5_checkpoint.pt", "modulated by the instruction"),
        (
            "proprio_projector--5_checkpoint.pt",
            "proprio_projector--5.* state is a token .* policy.state_size is not set",
        ),
        ("constants.py", r"bundled code states chunks of 25 actions .* policy\.chunk_size=8"),
    ],
)
def test_what_the_hub_holds_of_openvla_oft_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, says: str
) -> None:
    folder = write_official(tmp_path / "checkpoint")
    code = {file: "NUM_ACTIONS_CHUNK = 25"} if file.endswith(".py") else {}
    monkeypatch.setattr(oft, "published", lambda place: Published(names=(file,), code=code))
    with pytest.raises(CheckpointError, match=says):
        check_given(folder, OpenVLAOFTConfig(chunk_size=8, dialect="official"))
    monkeypatch.setattr(oft, "published", lambda place: Published())
    check_given(folder, OpenVLAOFTConfig(chunk_size=8, dialect="official"))


def test_openvla_oft_is_refused_as_plain_openvla_wherever_it_is_loaded(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "checkpoint")
    config = configured(folder)
    adapters = foreign(folder, tmp_path / "adapters", read_by=load)
    put(folder, "config.json", RAW | {"use_proprio": True})
    save_file(read("io"), folder / "io.npz")
    for look in (
        lambda: OpenVLAPolicy.from_pretrained(folder),
        lambda: OpenVLAPolicy(config),
        lambda: OpenVLAPolicy(config.model_copy(update={"lora": LoRAConfig(rank=2)})),
        lambda: load(adapters),
        lambda: verify(folder, folder / "io.npz", dataset="tiny_a", tower_heads=HEADS),
    ):
        with pytest.raises(CheckpointError, match=r"OpenVLA-OFT checkpoint by use_proprio in config\.json"):
            look()
    export_merged(adapters, tmp_path / "merged")  # says of itself what its base says
    assert inspect_folder(tmp_path / "merged").oft_signal is not None


def test_adapters_of_openvla_oft_are_refused(tmp_path: Path) -> None:
    adapters = foreign(write_official(tmp_path / "plain"), tmp_path / "lora_adapter", read_by=load)
    with pytest.raises(CheckpointError, match="OpenVLA-OFT checkpoint by its name, lora_adapter"):
        load(adapters)
    assert inspect_folder(adapters).oft_signal == "its name, lora_adapter"
