"""Nothing that lies in a downloaded folder decides what code is run; the user's own word does."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_policy import unseal
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from reachrl import registry
from reachrl.config.loading import config_dict, load_config
from reachrl.errors import CheckpointError, ConfigError
from reachrl.rewards.process.base import load_reward_model
from reachrl.rewards.process.transformers_model import TransformersRewardModel

EVIL = "runx.evil:M"


def plug_in(name: str, kind: str) -> str:
    """Python of an environment."""
    return (
        "from reachrl.testing.envs import ReachConfig, ReachEnv\n"
        f"class {name}(ReachEnv):\n    class Config(ReachConfig):\n        kind: str = {kind!r}\n"
    )


@pytest.fixture
def download(tmp_path, monkeypatch):
    """The folder `runx` with Python in it, where the command runs and where imports would find it."""
    folder = tmp_path / "runx"
    folder.mkdir()
    marker = tmp_path / "marker"
    (folder / "__init__.py").touch()
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        f"{plug_in('M', EVIL)}\nfrom reachrl.rewards.process.small import SmallRewardModel as R\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_TRUSTED", set())
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "runx"]:
        del sys.modules[name]


def test_all_code_that_has_to_be_named_is_named_at_once(download):
    file = stored_run(download, env={"kind": EVIL}, reward={"kind": "runx.evil:R"})
    with pytest.raises(ConfigError, match="add  env.kind=runx.evil:M reward.kind=runx.evil:R  to the command"):
        load_config(str(file))
    assert not ran(download)


def ran(download: Path) -> bool:
    return (download.parent / "marker").exists()


def stored_run(folder: Path, **sections: dict) -> Path:
    """A run's configuration with other options in some sections."""
    content = config_dict(load_config("toy"))
    for name, options in sections.items():
        content[name] = content[name] | options
    (folder / "config.json").write_text(json.dumps(content))
    return folder / "config.json"


def vit_reward_model(folder: Path, **named: str) -> Path:
    """A reward model of kind `transformers` whose description names other classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=2))
    nn.init.normal_(vit.classifier.weight)
    classes = {"model_class": "transformers:ViTForImageClassification", "processor_class": "transformers:AutoProcessor"}
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    model = TransformersRewardModel(vit, processor, **classes, prompt="", positive=0)
    model.save_pretrained(folder)
    return edit(unseal(folder) / "config.json", **named)  # whoever means harm seals it anew


def edit(file: Path, **changes: object) -> Path:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file.parent


SECTIONS = ["env", "policy", "reward", "reward_model", "curriculum", "algorithm", "backend"]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_runs_configuration_names_no_plug_in(download, section):
    file = stored_run(download, **{section: {"kind": EVIL}})
    with pytest.raises(ConfigError, match=rf"{section}\.kind names 'runx.evil:M'.*{section}\.kind=runx.evil:M"):
        load_config(str(file))
    assert not ran(download)


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("reward_model", {"kind": "transformers", "model_class": EVIL}),
        ("reward_model", {"kind": "transformers", "processor_class": EVIL}),
    ],
)
def test_nor_a_class(download, section, options):
    with pytest.raises(ConfigError, match="names 'runx"):
        load_config(str(stored_run(download, **{section: options})))
    assert not ran(download)


def test_nor_by_way_of_a_preset_it_builds_on(download):
    (download / "more.toml").write_text(f'base = "toy"\n[env]\nkind = "{EVIL}"\n')
    (download / "config.json").write_text(json.dumps({"base": str(download / "more.toml")}))
    with pytest.raises(ConfigError, match="names 'runx.evil:M'"):
        load_config(str(download / "config.json"))
    assert not ran(download)


def test_the_users_own_word_counts_typed_or_in_a_preset(download):
    file = stored_run(download, env={"kind": EVIL})
    assert load_config(str(file), [f"env.kind={EVIL}"]).env.tasks == load_config("toy").env.tasks
    assert ran(download)


def test_a_preset_of_ones_own_names_plug_ins(download):
    (download / "own.toml").write_text(f'base = "toy"\n[env]\nkind = "{EVIL}"\n')
    load_config(str(download / "own.toml"))
    assert ran(download)


def test_a_reward_model_names_no_kind_of_its_own(download):
    folder = edit(vit_reward_model(download / "model") / "config.json", kind="runx.evil:R")
    with pytest.raises(ConfigError, match=r"kind names 'runx.evil:R'.*--trust-kind runx.evil:R"):
        load_reward_model(folder)
    assert not ran(download)


@pytest.mark.parametrize("option", ["model_class", "processor_class"])
def test_nor_classes_but_those_of_transformers(download, option):
    assert np.isfinite(load_reward_model(vit_reward_model(download / "good")).score(frames(), ["go"])).all()
    with pytest.raises(ConfigError, match=f"{option} names 'runx.evil:M'"):
        load_reward_model(vit_reward_model(download / "model", **{option: EVIL}))
    assert not ran(download)


def frames():
    return np.asarray(Image.new("RGB", (32, 32), "gray"))[None]


@pytest.mark.parametrize("model_type", ["vit", "evil"])
def test_code_beside_a_checkpoint_is_not_run(download, model_type):
    folder = vit_reward_model(download / "model", model_class="transformers:AutoModelForImageClassification")
    (folder / "checkpoint" / "evil.py").write_text((download / "evil.py").read_text())
    there = {"AutoConfig": "evil.M", "AutoModelForImageClassification": "evil.M", "AutoProcessor": "evil.M"}
    for each in (folder / "checkpoint").glob("*.json"):
        edit(each, auto_map=there | {"AutoImageProcessor": "evil.M"})
    edit(folder / "checkpoint" / "config.json", model_type=model_type)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_reward_model(folder)
    assert not ran(download)


def test_kernels_of_the_hub_are_not_asked_for(download):
    folder = vit_reward_model(download / "model")
    edit(folder / "checkpoint" / "config.json", attn_implementation="somebody/kernels")
    with pytest.raises(CheckpointError, match="attn_implementation is 'somebody/kernels'"):
        load_reward_model(folder)


def test_a_download_where_the_command_runs_is_not_installed(download):
    info = download.parent / "evil-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[reachrl.envs]\ninnocent = {EVIL}\n")
    assert "innocent" not in registry.kinds("envs")
    with pytest.raises(ConfigError, match="unknown kind 'innocent'"):
        load_config(str(stored_run(download, env={"kind": "innocent"})))


COMMANDS = [
    ("train", "runx/config.json"),
    ("eval", "--policy", "runx/policy"),
    ("eval", "--run", "runx"),
    ("report", "runx/config.json", "--run", "runx"),
    ("plan", "runx/config.json"),
    ("config", "runx/config.json"),
    ("reward", "inspect", "runx"),
    ("reward", "inspect", "runx/policy", "runx"),
    ("reward", "segments", "runx"),
    ("export", "runx/policy", "--out", "exported"),
    ("model", "info", "runx/policy"),
    ("train", "toy", "reward.checkpoint=runx/policy", "--run", "runy"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_command_runs_it(download, command_line, arguments):
    stored_run(download, env={"kind": EVIL}, reward_model={"kind": EVIL})
    (download / "policy").mkdir()
    (download / "policy" / "config.json").write_text(json.dumps({"kind": EVIL}))
    (download / "reward_model" / "model").mkdir(parents=True)
    (download / "reward_model" / "model" / "config.json").write_text(json.dumps({"kind": EVIL}))
    (download / "reward_model" / "audit.parquet").touch()
    (download / "reward_model" / "quality.json").write_text(json.dumps({"config": {"kind": EVIL}}))
    code, _, err = command_line(*arguments)
    assert code > 0 and "Traceback" not in err, err
    assert not ran(download)


def test_where_the_command_runs_is_no_place_for_imports_until_the_user_names_one(monkeypatch, command_line, tmp_path):
    name = f"own_{time.time_ns()}"
    (tmp_path / f"{name}.py").write_text(plug_in("Own", f"{name}:Own"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command_line("config", "toy")
    assert str(tmp_path) not in sys.path
    assert command_line("config", "toy", f"env.kind={name}:Own")[0] == 0
    assert str(tmp_path) in sys.path
