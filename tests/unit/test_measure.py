"""Evaluation of any policy: shards, resuming, merging, and what the official protocol allows."""

import hashlib
import json
import os
import signal
from functools import partial

import pytest
import torch
from toy_policy import toy_config, toy_policy

from reachrl.cli.display import Display
from reachrl.config.libero_tasks import SUITES
from reachrl.config.protocols import evaluation_config
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError, StorageError
from reachrl.evaluation import evaluate, heldout_starts
from reachrl.pipeline import measure as measuring
from reachrl.pipeline.measure import Measurement, measure, played
from reachrl.report import result_page
from reachrl.testing.envs import ReachEnv

QUIET = Display(quiet=True)
CHANGES = ("eval.num_starts=3", "env.max_steps=6", "eval.num_videos=1")


@pytest.fixture
def policy(tmp_path):
    """A saved policy."""
    toy_policy(toy_config()).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def measurement(policy, out, num_envs=2, shard=(1, 1), *changes):
    config = toy_config(*CHANGES, f"env.num_envs={num_envs}", *changes)
    return Measurement(config=config, protocol="heldout", policy=policy, out=out, shard=shard)


@pytest.fixture
def whole(policy, tmp_path):
    """The result of one process that plays everything."""
    return measure(measurement(policy, tmp_path / "whole"), QUIET)


def test_shards_on_other_numbers_of_environments_give_what_one_process_gives(policy, whole, tmp_path):
    out = tmp_path / "shards"
    for number, num_envs in ((2, 1), (3, 4)):
        assert measure(measurement(policy, out, num_envs, (number, 3)), QUIET) is None
        assert not (out / "result.json").exists()
    result = measure(measurement(policy, out, 3, (1, 3)), QUIET)
    assert result["modes"] == whole["modes"]
    assert json.loads((out / "result.json").read_text())["modes"] == whole["modes"]
    assert [path.name for path in (out / "videos").iterdir()] == ["red-square.mp4"]
    page = (out / "result.html").read_text()
    assert all(f"{record['k']}/{record['n']}" in page for record in whole["modes"]["greedy"]["per_task"].values())


def test_the_merged_counts_are_those_of_the_plain_evaluation(policy, whole):
    config = toy_config(*CHANGES)
    with VectorEnv(config.env, 2) as envs:
        for mode in config.eval.modes:
            starts = heldout_starts(config.env, config.eval)
            plain = evaluate(toy_policy(config), envs, starts, mode=mode, config=config.eval).record()
            found = whole["modes"][mode]
            assert (found["k"], found["n"]) == (plain["k"], plain["n"])
            assert {task: found["per_task"][task] for task in plain["per_task"]} == plain["per_task"]


def test_it_computes_in_as_many_threads_as_asked(policy, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measure(measurement(policy, tmp_path / "out", 2, (1, 9), "num_threads=2"), QUIET)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_films_that_do_not_fit_on_the_page_are_named(whole, tmp_path, monkeypatch):
    out = tmp_path / "whole"
    film = out / "videos" / "red-square.mp4"
    (out / "videos" / "a-first.mp4").write_bytes(bytes(film.stat().st_size + 1))
    monkeypatch.setattr(result_page, "MAX_VIDEO_BYTES", film.stat().st_size)
    html = result_page.write_result_page(out, whole).read_text()
    assert html.count("<video") == 1 and "<figcaption>red-square</figcaption>" in html
    assert "see the folder videos/: a-first." in html


def test_an_interrupted_evaluation_goes_on_where_it_stopped(policy, whole, tmp_path, monkeypatch):
    out, lines = tmp_path / "cut", []

    class Cut(measuring.MetricsLog):
        def log(self, record):
            if len(lines) == 5:
                raise KeyboardInterrupt
            lines.append(record)
            super().log(record)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "MetricsLog", Cut)
        with pytest.raises(KeyboardInterrupt):
            measure(measurement(policy, out), QUIET)
    with open(out / "episodes" / "1-of-1.jsonl", "a") as file:
        file.write('{"kind": "episode", "mo')  # as a kill in the middle of a write leaves it
    assert len(played(out)) == 5
    # The rest by another partition; what is there is not played again.
    assert measure(measurement(policy, out, 2, (1, 2)), QUIET) is None
    assert measure(measurement(policy, out, 2, (2, 2)), QUIET)["modes"] == whole["modes"]
    written = [line for file in (out / "episodes").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert sum(line.endswith("}") for line in written) == len(played(out)) == 18


def test_an_outcome_is_recorded_once_its_film_stands(policy, tmp_path, monkeypatch):
    """A kill between the two must leave the episode to be played again, not an outcome without its film."""
    out = tmp_path / "cut"

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "write_film", kill)
        with pytest.raises(Killed):
            measure(measurement(policy, out), QUIET)
    assert ("greedy", "red-square", 0) not in played(out)
    measure(measurement(policy, out), QUIET)
    assert [path.name for path in (out / "videos").iterdir()] == ["red-square.mp4"]
    assert ("greedy", "red-square", 0) in played(out)


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        ("file", ConfigError, "--out .*file is a file; expected a folder"),
        ("file/below", StorageError, "Not a directory"),
        ("/proc/out", StorageError, "could not write /proc/out"),
        ("/proc/out/below", StorageError, "could not write /proc/out/below"),
        ("x" * 300, StorageError, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_is_played(policy, tmp_path, out, error, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=words):
        measure(measurement(policy, tmp_path / out), QUIET)


def test_a_killed_worker_costs_time_and_no_outcome(policy, whole, tmp_path, monkeypatch):
    step, calls = VectorEnv.step, []

    def step_and_kill(envs, *arguments):
        calls.append(envs)
        if len(calls) in (4, 11):
            os.kill(envs._workers[len(calls) % 2].pid, signal.SIGKILL)
        return step(envs, *arguments)

    monkeypatch.setattr(VectorEnv, "step", step_and_kill)
    monkeypatch.setattr(ReachEnv, "shares_process", False)  # a process for each episode
    result = measure(measurement(policy, tmp_path / "killed"), QUIET)
    assert calls[0].lost_episodes == 2 and result["modes"] == whole["modes"]


def test_a_folder_holds_one_evaluation(policy, whole, tmp_path):
    with pytest.raises(ConfigError, match="protocol_hash"):
        measure(measurement(policy, tmp_path / "whole", 2, (1, 1), "eval.seed=9"), QUIET)
    other = tmp_path / "other"
    toy_policy(toy_config(), seed=1).save_pretrained(other)
    with pytest.raises(ConfigError, match="weights"):
        measure(measurement(other, tmp_path / "whole"), QUIET)


def test_a_folder_begun_by_an_earlier_version_goes_on(policy, whole, tmp_path):
    """Its fingerprint was of the ends of each file, as short as digits alone."""
    file = tmp_path / "whole" / "measurement.json"
    data = (policy / "model.safetensors").read_bytes()
    edges = f"model.safetensors {len(data)} ".encode() + data[:1_000_000] + data[-1_000_000:]
    earlier = {"weights": hashlib.sha256(edges).hexdigest()[:16]}
    file.write_text(json.dumps(json.loads(file.read_text()) | earlier))
    assert measure(measurement(policy, tmp_path / "whole"), QUIET)["modes"] == whole["modes"]


def test_a_policy_for_another_environment_is_refused(tmp_path):
    config = toy_config()
    policy = config.policy.model_copy(update={"num_action_tokens": 7})
    toy_policy(config.model_copy(update={"policy": policy})).save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match="made for another environment"):
        measure(measurement(tmp_path / "policy", tmp_path / "out"), QUIET)


# --- protocols --------------------------------------------------------------------------------------

official = partial(evaluation_config, protocol="official", cores=3)


def test_the_official_protocol_is_liberos():
    config = official("toy", ["env.split=paper"], suite="libero_goal")
    env = config.env
    assert (env.kind, env.suite, env.tasks, env.max_steps) == ("libero", "libero_goal", SUITES["libero_goal"], 300)
    assert (env.simulation, env.num_envs, env.split) == ("faithful", 3, "paper")
    assert (config.eval.num_starts, config.eval.modes) == (50, ("greedy",))


def test_the_official_protocol_takes_its_suite_from_the_configuration(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'base = "robust"\n[env]\nkind = "libero"\nsuite = "libero_10"\nmax_steps = 99\nnum_eval_starts = 7\n'
        'simulation = "fast"\n[eval]\nnum_starts = 5\ntemperature = 1.5\n'
    )
    config = official(str(tmp_path / "mine.toml"), [], suite=None)
    assert (config.env.max_steps, config.eval.num_starts, config.env.simulation) == (520, 50, "faithful")
    assert config.eval.temperatures == (0.0,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["env.max_steps=100"], "env.max_steps: the official protocol has 280"),
        (["eval.num_starts=10"], "eval.num_starts: the official protocol has 50"),
        (["eval.temperatures=[2.0]"], "eval.temperatures: the official protocol has greedy actions"),
        (['env.tasks=["pick_up_the_milk_and_place_it_in_the_basket"]'], "all 10 of libero_object"),
    ],
)
def test_what_departs_from_the_official_protocol_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        official("toy", changes, suite="libero_object")
    sampled = official("toy", ["eval.temperatures=[1]", "env.image_size=224"], suite="libero_object")
    assert sampled.eval.modes == ("sampled",) and sampled.env.image_size == 224  # the policy's own affair
    # What only costs fidelity is allowed when it is asked for; the result says so.
    assert official("toy", ["env.simulation=fast"], suite="libero_object").env.simulation == "fast"


def test_another_simulator_has_no_official_protocol():
    with pytest.raises(ConfigError, match="LIBERO's, but env.kind is 'reach_toy'"):
        official("toy", [], suite=None)
    with pytest.raises(ConfigError, match="unknown suite 'libero_objects'"):
        official("toy", [], suite="libero_objects")


# --- command line -----------------------------------------------------------------------------------


def test_the_command_evaluates_a_runs_policy_with_the_runs_configuration(command_line, policy, tmp_path):
    (tmp_path / "config.json").write_text(toy_config(*CHANGES).model_dump_json())
    code, out, err = command_line("eval", "--policy", str(policy), "--protocol", "heldout", "env.num_envs=1", "-q")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "reach_toy-heldout" / "result.json").read_text())
    greedy = result["modes"]["greedy"]
    assert f"{greedy['k']}/9" in out and "all tasks" in out and "result.html" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "heldout"], "Name a preset"),
        (["toy", "--protocol", "heldout"], "no policy to evaluate"),
        (["toy", "--protocol", "official", "--policy", "."], "env.kind is 'reach_toy'"),
        (["toy", "--protocol", "published"], "expected heldout or official"),
        (["toy", "--policy", "nowhere"], "there is no policy in nowhere"),
        (["toy", "--shard", "1/2"], "go with --protocol"),
        (["toy", "--policy", ".", "--shard", "3/2"], "expected I/N"),
    ],
)
def test_a_mistake_in_the_command_is_told(command_line, arguments, words):
    code, _, err = command_line("eval", *arguments)
    assert code == 2 and words in err and "Traceback" not in err
