"""Configurations that no one means: each is a sentence at once, never a traceback."""

import json
import os
import time
from pathlib import Path

import pytest

from reachrl import torchrun
from reachrl.config.loading import load_config
from reachrl.errors import ConfigError

DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"seed={DIGITS}", "too large to be read"),
        (f"seed=0x{'f' * 5000}", "bits"),
        (f"seed={2**63}", "seed is a number of 64 bits"),
        ("seed=-1", "seed = -1"),
        ("seed=2026-11-27", "seed = datetime.date"),
        ("description=" + "[" * 5000, "too large to be read"),
        (".".join("a" * 500) + "=1", "a key of 500 parts"),
        ("x" * 5000 + "=1", "unknown key"),
        ("algorithm.lr=1e308", "algorithm.lr = 1e+308"),
        ("sft.lr=1e308", "sft.lr = 1e+308"),
        ("reward_model.lr=11", "reward_model.lr = 11"),
        ("algorithm.lr=nan", "algorithm.lr = nan"),
        ("algorithm.lr=inf", "algorithm.lr = inf"),
        ("env.worker_timeout_s=1e300", "worker_timeout_s is 1e+300"),
        (f"rollout.num_steps={10**22}", "num_steps is a number of 74 bits"),
        (f"env.num_envs={10**10}", "num_envs is a number of 34 bits"),
        ("policy.checkpoint=''", "checkpoint is ''"),
        ("policy.checkpoint=' '", "checkpoint is ' '"),
        ("reward.checkpoint=", "checkpoint is ''"),
        ('reward_model.trajectories=[""]', "trajectories is ''"),
        ('policy.checkpoint="a\\u0000b"', "checkpoint is"),
    ],
    ids=lambda text: text[:30],
)
def test_values_that_no_one_means_are_refused_in_a_few_lines(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("toy", [override])
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_line_break_in_an_override_does_not_set_another_key() -> None:
    assert load_config("toy", ['description="a"\nseed = 7']).description == '"a"\nseed = 7'


def test_hundred_thousand_unknown_tasks_are_refused_at_once(tmp_path: Path) -> None:
    names = [f"task-{number}" for number in range(100_000)]
    for kind, tasks in (("metaworld", names), ("metaworld", names * 2), ("libero", names)):
        file = tmp_path / "many.toml"
        file.write_text(f"base = 'robust'\n[env]\nkind = '{kind}'\ntasks = {json.dumps(tasks)}\n")
        began = time.process_time()
        with pytest.raises(ConfigError) as caught:
            load_config(str(file))
        assert time.process_time() - began < 1.0
        assert len(str(caught.value)) < 1500


def test_many_problems_are_told_as_a_few(tmp_path: Path) -> None:
    file = tmp_path / "many.json"
    file.write_text(json.dumps({f"key_{number}": 1 for number in range(20_000)}))
    with pytest.raises(ConfigError, match=r"and 19980 more") as caught:
        load_config(str(file))
    assert str(caught.value).count("\n") < 30


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_files_nested_too_deep_are_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"deep.{ending}"
    for levels in (30, 500, 50_000):
        nested = '{"a": ' * levels + "1" + "}" * levels
        file.write_text(nested if ending == "json" else "[" + ".".join("a" * levels) + "]\nx = 1\n")
        with pytest.raises(ConfigError, match="nested deeper than 20 levels"):
            load_config(str(file))


def test_bases_that_never_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "own.toml").write_text("base = 'sub/../own.toml'\n")
    (tmp_path / "long.toml").write_text(f"base = '{'x' * 5000}'\n")
    (tmp_path / "file.toml").write_text(f"base = '{'x' * 5000}.toml'\n")
    for number in range(40):
        (tmp_path / f"{number}.toml").write_text(f"base = '{number + 1}.toml'\n")
    os.symlink("own.toml", "link.toml")
    for name, said in (
        ("own.toml", "in a circle"),
        ("./own.toml", "in a circle"),
        ("link.toml", "in a circle"),
        ("long.toml", "File name too long"),
        ("file.toml", "File name too long"),
        ("0.toml", "more than 20 presets build on each other"),
        ("a\0b.toml", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            load_config(name)
        assert len(str(caught.value)) < 1500


def test_a_byte_order_mark_is_read_over_and_a_key_stands_once(tmp_path: Path) -> None:
    (tmp_path / "mark.toml").write_bytes(b"\xef\xbb\xbfbase = 'toy'\nseed = 5\n")
    (tmp_path / "mark.json").write_bytes(b'\xef\xbb\xbf{"base": "toy", "seed": 6}')
    assert load_config(str(tmp_path / "mark.toml")).seed == 5
    assert load_config(str(tmp_path / "mark.json")).seed == 6
    (tmp_path / "twice.json").write_text('{"seed": 1, "seed": 2}')
    (tmp_path / "twice.toml").write_text("seed = 1\nseed = 2\n")
    for name in ("twice.json", "twice.toml"):
        with pytest.raises(ConfigError, match="not valid"):
            load_config(str(tmp_path / name))


GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"RANK": "abc"}, "RANK='abc': expected a whole number"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "²"}, "RANK='²'"),
        ({"RANK": "9" * 5000}, "RANK='999"),
        ({"RANK": "2"}, "ranks go from 0 to 1"),
        ({"RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK=7"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": "70000"}, "expected a port"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_variables_of_torchrun_are_one_line(
    monkeypatch: pytest.MonkeyPatch, broken: dict[str, str], said: str
) -> None:
    for name, value in (GOOD | broken).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        torchrun.check()
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_command_that_ends_for_broken_variables_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(SystemExit, match="2"):
        torchrun.leave(2)


def test_good_variables_and_none_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
    torchrun.check()
    assert (torchrun.rank(), torchrun.size(), torchrun.local_rank()) == (0, 1, None)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    torchrun.check()
    assert (torchrun.rank(), torchrun.size(), torchrun.local_rank()) == (1, 2, 0)


@pytest.mark.parametrize("key", ["algorithm.lr", "rollout.num_steps", "num_threads", "env.max_steps"])
def test_a_truth_value_is_no_number(key):
    with pytest.raises(ConfigError, match=rf"{key.rpartition('.')[2]} is true: expected a number"):
        load_config("toy", [f"{key}=true"])


@pytest.mark.parametrize("key", ["eval.temperatures=0,0", "eval.modes=greedy,greedy"])
def test_a_temperature_counts_once(key):
    with pytest.raises(ConfigError, match="eval.temperatures.*twice"):
        load_config("toy", [key])


def test_pixels_are_not_divided_by_zero():
    with pytest.raises(ConfigError, match="image_std is .*expected numbers above 0"):
        load_config("toy", ["policy.image_std=[[0.5,0.5,0.5],[0.5,0,0.5]]"])


@pytest.mark.parametrize(
    ("preset", "size", "said"),
    [
        (
            "metaworld_quickstart",
            32,
            r"image_size=32 is not a multiple of 24 \(the strides 4 \* 2 \* 3\); set it to 24 or",
        ),
        ("metaworld_quickstart", 10, "set it to 24 or 48"),
        ("libero_object", 200, r"image_size=200 is not a multiple of 14 \(patch_size\); set it to 196 or 210"),
    ],
)
def test_frames_that_patches_do_not_fill_are_told_the_next_sizes(preset: str, size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(preset, [f"policy.image_size={size}"])
