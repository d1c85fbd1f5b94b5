"""What `import reachrl` offers: nothing is loaded before it is used; runs stop, go on and give back their results."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rich.console
from small_policy import save_base
from tiny_run import play, tiny_config, train_lines

import reachrl
from reachrl import registry
from reachrl.config.loading import load_config
from reachrl.errors import CheckpointError, ConfigError, StopTraining
from reachrl.functional.stats import wilson
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.results import EvaluationResult
from reachrl.testing.envs import ReachEnv
from reachrl.testing.policies import TablePolicy, TablePolicyConfig


@pytest.fixture(scope="module")
def config():
    return tiny_config()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run that a callback stopped after its first iteration, and that was then finished: folder and both results."""
    folder = tmp_path_factory.mktemp("face") / "run"
    heard = []

    def stop(record):
        heard.append(record)
        return record["iteration"] == np.int64(0)  # a numpy bool

    stopped = reachrl.train(config, folder, callbacks=[stop, lambda record: "no answer"], quiet=True)
    interim = (folder / "report.html").read_text()
    stopped_policy = stopped.policy
    return folder, heard, stopped, interim, stopped_policy, reachrl.train(config, folder, quiet=True)


def test_importing_the_package_loads_nothing_else():
    program = (
        "import sys, reachrl; print([name for name in ('numpy', 'torch', 'pydantic', 'rich', 'transformers') "
        "if name in sys.modules], dir(reachrl)); reachrl.load_config; print('torch' in sys.modules)"
    )
    loaded, torch_too = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert loaded.startswith("[] [")
    assert all(f"'{name}'" in loaded for name in ("evaluate", "load_config", "load_policy", "train"))
    assert torch_too == "False"  # a configuration is read in a moment


def test_any_policy_is_imported_without_a_warning_of_kernels_that_are_not_used():
    """Which module asks peft first, and with it bitsandbytes, differs; all of them import the package of policies."""
    program = "import logging, reachrl.policies; logging.getLogger('bitsandbytes.backends').warning('of no use here')"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert shown.stderr == ""


def test_the_face_is_functions_whatever_else_was_imported():
    import reachrl.evaluation
    import reachrl.loop

    assert all(callable(getattr(reachrl, name)) for name in ("evaluate", "load_config", "load_policy", "train"))
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = reachrl.tarin


def test_a_notebook_shows_rates_not_records(run):
    result = run[-1]
    shown = repr(result)
    assert shown.splitlines()[0] == f"TrainResult {result.folder}: trained {result.iterations} iterations"
    assert f"sampled: {result.before['sampled'].success} before, {result.after['sampled'].success} after" in shown
    assert len(shown.splitlines()) == 1 + len(result.after) and "'episode" not in shown
    rates = repr(result.after["sampled"])
    assert rates.splitlines()[0] == f"EvaluationResult sampled: {result.after['sampled'].success}"
    assert len(rates.splitlines()) == 1 + len(result.after["sampled"].per_task)


def test_overrides_by_key_are_those_of_the_command_line():
    typed = load_config("toy", ["env.num_envs=2", "env.tasks=red-square,blue-square", "seed=3"])
    assert load_config("toy", {"env": {"num_envs": 2, "tasks": ["red-square", "blue-square"]}, "seed": 3}) == typed
    by_class = load_config("toy", {"policy.num_contexts": 5, "policy": {"kind": TablePolicy}})
    assert by_class.policy == TablePolicyConfig(num_contexts=5)  # whose kind is the import string
    with pytest.raises(ConfigError, match="unknown key 'env.num_env'.*did you mean 'num_envs'"):
        load_config("toy", {"env.num_env": 2})
    with pytest.raises(ConfigError, match="expected a list of texts"):
        load_config("toy", "seed=3")


def test_a_class_that_other_processes_cannot_find_is_refused():
    class Inner(ReachEnv):
        pass

    with pytest.raises(ConfigError, match="defined inside a function"):
        load_config("toy", {"env.kind": Inner})


def test_a_stopped_run_has_a_checkpoint_and_goes_on_to_the_same_numbers(config, run, tmp_path):
    folder, heard, stopped, interim, policy, finished = run
    assert [record["iteration"] for record in heard] == [0]
    assert stopped.stopped and stopped.iterations == 1 and stopped.before == stopped.after == {}
    assert stopped.policy_folder.parent.name == "step_000001"  # off the schedule, which is every second
    assert isinstance(policy, OpenVLAPolicy)
    assert "1 of 3" in interim
    assert not finished.stopped and finished.iterations == 3
    play(config, tmp_path / "whole", "demos", "sft", "reward", "train")
    assert train_lines(folder) == train_lines(tmp_path / "whole")


def test_results_are_those_on_disk_with_their_intervals(config, run):
    folder, *_, result = run
    assert [record["iteration"] for record in result.metrics] == [0, 1, 2]
    assert all(isinstance(key, str) for record in result.metrics for key in record)
    for when, found in (("before", result.before), ("after", result.after)):
        stored = json.loads((folder / "eval" / f"{when}.json").read_text())
        assert list(found) == ["sampled", "greedy"]  # the headline first
        for mode, evaluation in found.items():
            k = sum(episode["success"] for episode in stored[mode]["episodes"])
            assert (evaluation.success.k, evaluation.success.n) == (k, 3)
            assert evaluation.success.wilson95 == pytest.approx(wilson(k, 3))
            assert set(evaluation.per_task) == set(config.env.tasks)
    assert result.report == folder / "report.html" and result.report.is_file()


def test_evaluating_again_gives_the_same_episodes(config, run, capsys, monkeypatch):
    result = run[-1]
    # As in a notebook, which asks programs for colours although it is no terminal.
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    found = reachrl.evaluate(result.policy, config, mode="greedy")
    assert found == result.after["greedy"]
    printed = capsys.readouterr().out
    assert "eval: held-out starts, greedy" in printed and "\x1b" not in printed
    test = found.compare(result.after["greedy"])
    assert (test.improved, test.worsened, test.p_value) == (0, 0, 1.0)
    with pytest.raises(ConfigError, match="mode greedy.*mode sampled"):
        found.compare(result.after["sampled"])
    with pytest.raises(ConfigError, match="expected 'greedy', 'sampled', 'mean' or"):
        reachrl.evaluate(result.policy, config, mode="best")  # pyright: ignore[reportArgumentType]


def test_a_paired_comparison_counts_starts():
    def evaluation(*outcomes):
        episodes = [{"task": "a", "start": n, "success": each, "num_steps": 1} for n, each in enumerate(outcomes)]
        record = {"k": sum(outcomes), "n": len(outcomes), "rate": 0.5, "wilson95": [0, 1], "per_task": {}}
        return EvaluationResult.of("greedy", record | {"episodes": episodes}, protocol_hash="p", caveats=())

    test = evaluation(False, False, False, True, False).compare(evaluation(True, True, True, False, False))
    assert (test.improved, test.worsened) == (3, 1)
    assert test.p_value == pytest.approx(2 * (1 + 4) / 16)  # binomial: at most 1 of 4
    with pytest.raises(ConfigError, match="same start states"):
        evaluation(True).compare(evaluation(True, True))


def test_a_policy_is_found_in_whatever_holds_it(run, tmp_path):
    folder, *_, result = run
    weights = result.policy.state_dict()
    for source in (folder, folder / "policy", str(folder / "checkpoints" / "step_000003")):
        loaded = reachrl.load_policy(source, device="cpu")
        assert not loaded.training
        assert all(value.equal(weights[key]) for key, value in loaded.state_dict().items())
    other = tmp_path / "run" / "checkpoints" / "step_000002"
    shutil.copytree(folder / "policy", tmp_path / "run" / "policy")
    save_base(other / "policy")  # for frames of 16 pixels, not 24
    for file in (tmp_path / "run" / "stages.json", other / "state.json"):
        file.write_text("{}")
    shutil.copy(folder / "config.json", tmp_path / "run")
    sizes = [reachrl.load_policy(source).config.image_size for source in (tmp_path / "run", other, other / "policy")]
    assert sizes == [24, 16, 16]
    with pytest.raises(CheckpointError, match="does not exist"):
        reachrl.load_policy(tmp_path / "none")
    with pytest.raises(ConfigError, match="device=gpu"):
        reachrl.load_policy(folder, device="gpu")
    (tmp_path / "unfinished" / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "unfinished" / "stages.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has not finished.*step_000002"):
        reachrl.load_policy(tmp_path / "unfinished")


def test_a_stored_configuration_does_not_decide_which_class_a_policy_is(run, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "stages.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"policy": {"kind": "runx.evil:Policy"}}))
    with pytest.raises(ConfigError, match="runx.evil:Policy.*neither built in"):
        reachrl.load_policy(tmp_path)
    assert "runx.evil" not in sys.modules


def test_a_run_of_a_notebook_says_where_its_class_is(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_TRUSTED", set())  # other tests name classes of this name
    stored = load_config("toy").model_dump(mode="json")
    stored["env"] |= {"kind": "__main__:Slider"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="'__main__:Slider', a class that was defined in a notebook"):
        load_config(str(tmp_path / "config.json"))
    with pytest.raises(Exception, match="there is no class 'Slider' in the notebook or script that is running"):
        load_config("toy", {"env.kind": "__main__:Slider"})


def test_every_callback_hears_of_the_iteration_that_one_of_them_ends():
    from reachrl.loop import asked_to_stop

    heard = []

    def raises(record):
        raise StopTraining

    assert asked_to_stop([raises, heard.append], {"iteration": 4})
    assert heard == [{"iteration": 4}]
    assert not asked_to_stop([lambda record: 1, lambda record: record, heard.append], {})
