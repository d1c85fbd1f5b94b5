"""`reachrl model`: what a folder holds, and whether it computes what was recorded."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from official_folder import DATA, read, to_native, write_official
from safetensors.numpy import load_file, save_file
from small_policy import foreign

from reachrl.config.policy import OpenVLAConfig
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.verify import TOLERANCES

STATISTICS = json.loads((DATA / "config.json").read_text())["norm_stats"]


@pytest.fixture
def model(command_line):
    """Run `reachrl model ...`; returns exit code, stdout, stderr."""
    return partial(command_line, "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("official"))


# --- info -------------------------------------------------------------------------------------------------------


def rows(out: str) -> dict[str, str]:
    """The lines of the printed tables by their first column, continued lines appended."""
    found, name = {}, ""
    for line in out.splitlines():
        key, _, rest = line.partition("  ")
        name = key.strip() or name
        found[name] = f"{found[name]} {rest.strip()}" if not key.strip() and name in found else rest.strip()
    return found


def test_info_of_an_official_folder(model, folder: Path) -> None:
    code, out, err = model("info", folder)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 100
    weights = read("model")
    dead = ("blocks.3.", "norm."), ("blocks.4.", "norm.", "attn_pool.")
    counts = []
    for tower, unread in zip(("featurizer", "fused_featurizer"), dead, strict=True):
        own = {k.split(f".{tower}.")[1]: v.size for k, v in weights.items() if f".{tower}." in k}
        counts.append((sum(own.values()), sum(size for key, size in own.items() if key.startswith(unread))))
    found = rows(out)
    for part, (stored, unread) in zip(("tower 1", "tower 2"), counts, strict=True):
        assert f"{stored:,}" in found[part] and f"{unread:,}" in found[part]
    stored, unread = sum(value.size for value in weights.values()), sum(unread for _, unread in counts)
    assert found["all"].split() == [f"{stored - unread:,}", "are", "read", f"{stored:,}", f"{unread:,}"]
    assert "official OpenVLA layout" in found["layout"] and "Prismatic" not in found["layout"]
    assert found["stored as"] == "F32" and found["statistics"].startswith("tiny_a (7), tiny_b (7)")
    assert "56 x 56 pixels (resize-naive), 16 patches" in found["image"]
    assert "heads unknown" in found["tower 1"] and "4 registers" in found["tower 1"]
    assert "width 32, 2 layers, 4 heads" in found["language model"] and "31744..31999" in found["language model"]
    assert "take to {instruction}?" in found["prompt"] and "no tokenizer" in found["its tokens"]
    live = stored - unread
    assert found["weights that are read"].split() == [f"{2 * live / 1e9:.3f}", f"{4 * live / 1e9:.3f}"]


def test_info_names_prismatics_layout(model, tmp_path: Path) -> None:
    found = rows(model("info", write_official(tmp_path, to_native))[1])
    assert "Prismatic's own names" in found["layout"] and "2,265,642" in found["all"]


def test_info_shows_openvla_oft(model, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()  # the name of a folder may be a sign too, and pytest's holds this test's
    write_official(tmp_path / "checkpoint", use_proprio=True)
    code, out, _ = model("info", tmp_path / "checkpoint")
    assert code == 0 and "OpenVLA-OFT by use_proprio in config.json" in rows(out)["layout"]


def small() -> OpenVLAPolicy:
    sizes = {
        "image_size": 16,
        "towers": ({"kind": "conv", "stages": [{"channels": 8, "kernel": 8, "stride": 8}]},),
        "image_mean": ((0.5, 0.5, 0.5),),
        "image_std": ((0.5, 0.5, 0.5),),
        "language_model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "value_hidden_size": 8,
        "dtype": "bfloat16",
    }
    return OpenVLAPolicy(OpenVLAConfig.model_validate(sizes))


def test_info_of_our_own_folder(model, tmp_path: Path) -> None:
    policy = small()
    policy.save_pretrained(tmp_path / "policy")
    code, out, _ = model("info", tmp_path / "policy")
    found = rows(out)
    number = f"{sum(value.numel() for value in policy.state_dict().values()):,}"
    assert code == 0 and found["layout"] == "written by ReachRL"
    assert found["all"].split() == [number, "are", "read", number, "0"]
    assert "BF16" in found["stored as"] and "F32" in found["stored as"]  # the value head stays in float32
    assert policy.tokenizer is not None and "reachrl (4)" in found["statistics"]
    ids = policy.tokenizer.prompt_ids("pick up the red block")
    assert found["its tokens"].split() == [str(number) for number in ids]
    # two heads of 8 in two layers over 4 patches, 16 prompt tokens and 3 action tokens
    assert f"cache of one row of {4 + 16 + 3} positions" in found


def test_info_of_adapters_shows_them_and_their_base(model, folder: Path, base: Path, tmp_path: Path) -> None:
    adapter = foreign(base, tmp_path / "adapter", written={"target_modules": ["v_proj", "q_proj"], "r": 4})
    path = adapter / "adapter_config.json"
    raw = json.loads(path.read_text())
    for name, shown in ((str(folder), True), ("openvla/openvla-7b", False)):
        path.write_text(json.dumps({**raw, "base_model_name_or_path": name}))
        code, out, _ = model("info", adapter)
        found = rows(out)
        assert code == 0 and "LoRA" in out and found["weights"] == f"{3 * 2 * 4 * (32 + 32):,}"
        assert found["rank, alpha"] == "4, 4"
        assert found["adapted"] == "q_proj, v_proj" and Path(name).name in out.replace("\n", "")
        assert ("2,265,642" in out) == shown
    path.write_text(json.dumps({**raw, "lora_alpha": 0}))
    code, _, err = model("info", adapter)
    assert code == 6 and "lora_alpha = 0" in err


def test_info_says_what_is_no_checkpoint(model, tmp_path: Path) -> None:
    code, out, err = model("info", tmp_path / "nowhere")
    assert (code, out) == (6, "") and "does not exist or is not a folder" in err
    code, _, err = model("info", tmp_path)
    assert code == 6 and "config.json is missing" in err
    write_official(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    code, _, err = model("info", tmp_path)
    assert code == 6 and "tokenizer.json cannot be read" in err and "Traceback" not in err


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What lies on the hub as `me/tiny`: a checkpoint with one set of statistics."""
    folder = write_official(tmp_path / "hub", norm_stats={"tiny_a": STATISTICS["tiny_a"]})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder))
    return folder


def test_a_model_on_the_hub_is_described_and_verified(model, hub: Path) -> None:
    assert rows(model("info", "me/tiny")[1])["statistics"].startswith("tiny_a (7) action")
    arguments = ("--recorded", hub / "io.safetensors", "--tower-heads", "4,4")
    save_file(read("io"), hub / "io.safetensors")
    code, out, err = model("verify", "me/tiny", *arguments)
    assert (code, err) == (0, "") and "actions" in out


# --- verify -----------------------------------------------------------------------------------------------------


@pytest.fixture
def check(model, folder: Path, tmp_path: Path):
    """Run `verify` on a recording; returns exit code, outcome by tensor, all output."""

    def run(recorded: dict[str, np.ndarray], *options: object, weights: Path = folder) -> tuple[int, dict, str]:
        save_file(recorded, tmp_path / "io.safetensors")
        arguments = ("--recorded", tmp_path / "io.safetensors", "--tower-heads", "4,4", *options)
        code, out, err = model("verify", weights, *arguments)
        lines = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in TOLERANCES]
        return code, {words[0]: words[-1] for words in lines}, out + err

    return run


def damaged(folder: Path, key: str) -> Path:
    """The same checkpoint with one number of one weight changed."""
    write_official(folder)
    weights = load_file(folder / "model.safetensors")
    weights[key] = weights[key].copy()
    weights[key].flat[7] += 0.5
    save_file(weights, folder / "model.safetensors")
    return folder


def test_the_recordings_are_met(check) -> None:
    code, outcome, out = check(read("io"), "--dataset", "tiny_a")
    assert code == 0 and outcome == dict.fromkeys(TOLERANCES, "pass")
    assert "Not compared: actions_noempty_tiny_b" in out and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("key", "intact"),
    [
        ("vision_backbone.featurizer.patch_embed.proj.weight", set()),
        ("projector.fc3.weight", {"vision_features"}),
        ("language_model.model.layers.1.self_attn.v_proj.weight", {"vision_features", "projected"}),
    ],
)
def test_a_damaged_weight_fails(check, tmp_path: Path, key: str, intact: set[str]) -> None:
    code, outcome, _ = check(read("io"), "--dataset", "tiny_a", weights=damaged(tmp_path / "damaged", key))
    numbers = {"vision_features", "projected", "action_row_logits", "tf_action_logits"}
    assert code == 1
    assert {name for name in numbers if outcome[name] == "pass"} == intact
    assert {name for name in numbers if outcome[name] == "FAIL"} == numbers - intact


def test_a_weight_that_is_never_read_does_not_matter(check, tmp_path: Path) -> None:
    dead = damaged(tmp_path / "damaged", "vision_backbone.featurizer.blocks.3.attn.qkv.weight")
    assert check(read("io"), "--dataset", "tiny_a", weights=dead)[0] == 0


def test_each_recorded_tensor_is_looked_at(check) -> None:
    for name, tolerance in TOLERANCES.items():
        recorded = read("io")
        recorded[name] = recorded[name].copy()
        recorded[name].flat[3] += 1 if name == "tokens" else 2 * tolerance
        code, outcome, out = check(recorded, "--dataset", "tiny_a")
        assert code == 1
        # another token changes what is teacher-forced after it
        failed = {name, "tf_action_logits"} if name == "tokens" else {name}
        assert {key for key in outcome if outcome[key] == "FAIL"} == failed, name
        assert ("1 differ" in out) == (name == "tokens")


def test_padding_is_not_compared_and_nan_is(check) -> None:
    recorded = read("io")
    length = int(recorded["prompt_len"][0])
    recorded["action_row_logits"] = recorded["action_row_logits"].copy()
    recorded["action_row_logits"][0, length + 16 :] = np.nan  # behind 16 patches and the first prompt
    assert check(recorded, "--dataset", "tiny_a")[0] == 0
    recorded["action_row_logits"][0, length + 15] = np.nan  # its last token
    assert check(recorded, "--dataset", "tiny_a")[1]["action_row_logits"] == "FAIL"


def test_part_of_the_outputs_is_compared_and_verifies_nothing(check) -> None:
    """Another function may share a tensor's name, and its value."""
    recorded = read("io")
    part = {name: recorded[name] for name in ("pixel_values", "projected", "tokens")}
    code, outcome, out = check(part)
    assert (code, outcome) == (1, {"projected": "pass"}) and "Not compared: tokens" in out
    assert "not verified without vision_features, action_row_logits, tokens, tf_action_logits, actions" in " ".join(
        out.split()
    )
    code, outcome, out = check({key: recorded[key] for key in recorded if key != "actions"}, "--dataset", "tiny_a")
    assert code == 1 and set(outcome.values()) == {"pass"} and "not verified without actions; record" in out
    for nothing in (("tokens", "input_ids"), ("pixel_values", "input_ids"), ("vision_features",)):
        code, _, out = check({name: recorded[name] for name in nothing})
        assert code == 6 and "can be compared" in out and nothing[0] in out


def test_recordings_of_another_model_are_refused(check) -> None:
    io = read("io")
    for changes, message in (
        ({"pixel_values": io["pixel_values"][:, :3]}, "pixel_values are [3, 3, 56, 56], expected ['N', 6, 56, 56]"),
        ({"input_ids": io["input_ids"] + 32000}, "input_ids are not all in 0..32063"),
        ({"attention_mask": io["attention_mask"][:, ::-1].copy()}, "padded on the left"),
        ({"attention_mask": io["attention_mask"][:, :9]}, "attention_mask [3, 9], expected"),
        ({"pixel_values": io["pixel_values"][:2]}, "the inputs have [2, 3] rows"),
        ({"projected": io["projected"][:, :, :16]}, "projected [3, 16, 16], expected [3, 16, 32]"),
        ({"tokens": io["tokens"][:2]}, "the inputs have [2, 3] rows"),
        ({"tokens": io["tokens"][0]}, "tokens are [7], expected 2 dimensions"),
        ({"tokens": io["tokens"][:, :6]}, "tokens are [3, 6], expected ['N', 7] by the action statistics"),
        ({"prompt_len": np.array(3)}, "prompt_len are [], expected 1 dimensions"),
    ):
        code, _, out = check({**io, **{k: np.copy(v, order="C") for k, v in changes.items()}}, "--dataset", "tiny_a")
        assert code == 6 and message in out and "Traceback" not in out, message


def test_what_is_missing_is_asked_for(check, model, folder: Path, tmp_path: Path) -> None:
    code, _, out = check(read("io"))
    assert code == 6 and "['tiny_a', 'tiny_b']" in out and "--dataset NAME" in out
    code, _, err = model("verify", folder, "--recorded", tmp_path / "nothing", "--tower-heads", "4,4")
    assert code == 6 and "missing or not a safetensors file" in err
    code, _, err = model("verify", folder, "--recorded", tmp_path / "io.safetensors")
    assert code == 6 and "unknown vision towers" in err
    for heads in ("4", "4,4,4"):
        code, _, err = model("verify", folder, "--recorded", tmp_path / "io.safetensors", "--tower-heads", heads)
        assert code == 6 and "2 vision towers" in err and "one number for each in --tower-heads" in err
    for heads in ("4,x", "4,,4", "0,4"):
        code, _, err = model("verify", folder, "--recorded", tmp_path / "io.safetensors", "--tower-heads", heads)
        assert code == 2 and f"--tower-heads '{heads}'" in err
