"""LIBERO-PRO: what is said and played, against what the benchmark's own functions returned."""

import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from reachrl.config import bddl, libero_pro
from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_pro import KINDS, check_pro, pro_kind
from reachrl.config.libero_tasks import SUITES, instruction
from reachrl.envs.libero.pro import _states
from reachrl.errors import ConfigError, MissingExtra
from reachrl.pipeline.published_pro import pro_conditions
from reachrl.types import Start

RECORDED = json.loads((Path(__file__).parent / "data" / "libero_pro.json").read_text())
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
installed = (libero_pro._TARGET / "libero" / "libero").is_dir()
needs_files = pytest.mark.skipif(not installed, reason="LIBERO-PRO is not installed: make libero")


@needs_files
def test_words_change_where_the_axis_says_so_and_never_in_upstreams_functions():
    assert len(RECORDED["said"]) == 84
    for key, (theirs, in_file) in RECORDED["said"].items():
        suite, kind, task = key.split()
        config = LiberoConfig(suite=suite)
        said = [config.spoken("-", Start(task, "eval", 3, f"{name}:{kind}")) for name in ("pro", "pro-upstream")]
        assert said == [in_file if kind in ("lan", "task") else instruction(task), theirs]
        assert theirs == instruction(task)


@needs_files
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_the_installed_files_are_the_released_ones(suite):
    check_pro(suite)


@needs_files
def test_every_stored_start_is_played_or_a_share_of_each_tasks():
    env = LiberoConfig(suite="libero_goal")
    whole, tenth = (pro_conditions(env, "corrected", None, Fraction(share), 0) for share in ("1", "1/10"))
    assert [axis.axis for axis in whole.axes] == ["lan", "object", "swap", "task"] and len(whole.plain) == 500
    for all_of, some in zip(whole.axes, tenth.axes, strict=True):
        (everything,), (part,) = all_of.levels, some.levels
        assert len(everything.starts) == 500 and set(part.starts) <= set(everything.starts)
        assert Counter(start.task for start in part.starts) == dict.fromkeys(env.tasks, 5)
        assert part.label == f"{everything.label}: 50 of 500"
        assert {start.variant for start in everything.starts} == {f"pro:{all_of.axis}"}
    few = LiberoConfig(suite="libero_goal", tasks=env.tasks[:2], num_eval_starts=3)
    asked = pro_conditions(few, "upstream", "swap,lan", Fraction(1), 0)
    assert [(axis.axis, len(axis.levels[0].starts)) for axis in asked.axes] == [("swap", 6), ("lan", 6)]
    assert len(asked.plain) == 6 and asked.axes[0].levels[0].starts[0].variant == "pro-upstream:swap"
    assert "the first 3 of 50 stored start states (env.num_eval_starts)" in asked.caveats
    assert not any("another goal" in caveat for caveat in asked.caveats)
    assert any("another goal" in caveat and "0 is expected" in caveat for caveat in whole.caveats)


@needs_files
@pytest.mark.parametrize(
    ("suite", "axes", "told"),
    [
        ("libero_90", None, "LIBERO-PRO has no tasks of env.suite=libero_90; it has libero_spatial"),
        ("libero_goal", "env", "LIBERO-PRO's env tasks are not played"),
        ("libero_goal", "language", "LIBERO-PRO has no axis 'language'"),
        ("libero_goal", ",", "--axes names none; LIBERO-PRO has lan, object, swap, task"),
    ],
)
def test_what_it_does_not_have_is_refused_in_one_line(suite, axes, told):
    with pytest.raises(ConfigError, match=told) as error:
        pro_conditions(LiberoConfig(suite=suite), "corrected", axes, Fraction(1), 0)
    assert "\n" not in str(error.value)


def test_an_episodes_axis_is_checked():
    assert [pro_kind(Start(MILK, "eval", 0, each)) for each in ("", "noise=20", "plus:x", "pro:swap")] == [
        *("", "", "", "swap")
    ]
    with pytest.raises(ConfigError, match="^pro:swop: LIBERO-PRO has no axis 'swop'; did you mean 'swap'"):
        pro_kind(Start(MILK, "eval", 0, "pro:swop"))


def test_a_suite_that_is_not_installed_is_told_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(libero_pro, "_TARGET", tmp_path)
    with pytest.raises(MissingExtra, match=r"^LIBERO-PRO is not installed; run  pip install .*--target .* libero-pro-"):
        check_pro("libero_goal")


@needs_files
def test_an_edited_file_is_told_with_the_command(monkeypatch, tmp_path):
    real, suite = libero_pro.pro_folder(), "libero_goal"
    for kind in KINDS:
        for part in ("bddl_files", "init_files"):
            (tmp_path / "libero" / "libero" / part).mkdir(parents=True, exist_ok=True)
            os.symlink(real / part / f"{suite}_{kind}", tmp_path / "libero" / "libero" / part / f"{suite}_{kind}")
    monkeypatch.setattr(libero_pro, "_TARGET", tmp_path)
    check_pro(suite)
    folder = tmp_path / "libero" / "libero" / "bddl_files" / f"{suite}_lan"
    folder.unlink()
    folder.mkdir()
    for task in SUITES[suite]:
        (folder / f"{task}.bddl").write_text((real / "bddl_files" / folder.name / f"{task}.bddl").read_text())
    check_pro(suite)
    edited = folder / "turn_on_the_stove.bddl"
    edited.write_text(edited.read_text().replace("switch on", "turn on"))
    with pytest.raises(ConfigError, match="one was edited, or the version is another; run  pip install"):
        check_pro(suite)
    edited.write_text("(define)")
    bddl.sentence_of.cache_clear()
    with pytest.raises(ConfigError, match=r"was edited: it has no \(:language"):
        LiberoConfig(suite=suite).spoken("-", Start("turn_on_the_stove", "eval", 0, "pro:lan"))
    bddl.sentence_of.cache_clear()
    edited.unlink()
    with pytest.raises(ConfigError, match="turn_on_the_stove.bddl cannot be read"):
        check_pro(suite)


def test_stored_starts_never_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    np.savez(tmp_path / "a.npz", states=np.array([[Evil()]], dtype=object))
    np.savez(tmp_path / "b.npz", states=np.zeros((50, 3), np.float32))
    (tmp_path / "c.npz").write_bytes(b"PK")
    for name, told in (("a", "cannot be read as stored"), ("b", "expected start states as float64"), ("c", "cannot")):
        with pytest.raises(ConfigError, match=told):
            _states(tmp_path / f"{name}.npz")
