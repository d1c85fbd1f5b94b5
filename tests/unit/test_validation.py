"""Choosing weights on validation starts: the best of them, patience, what is kept, and the same after a kill."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import play, tiny_config, train_lines
from toy_policy import toy_config

from reachrl.backends.base import Pending
from reachrl.backends.local import LocalEvaluator
from reachrl.backends.policy_loading import policy_folder
from reachrl.cli.eval import checkpoint_iteration, chosen_checkpoint
from reachrl.errors import ConfigError
from reachrl.pipeline import rl_stages
from reachrl.pipeline.branch import branch
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.checkpoint import save_checkpoint
from reachrl.validation import BEST, ValidationCurve, longest_wait

DENSE = "reward.kind=oracle"  # some reward in every rollout, so that weights move
EVERY = (DENSE, "eval.during_every=1", "eval.during_starts=1", "num_iterations=5", "checkpoint_every=2")


@dataclass
class Version:
    """Weights that have nothing but a version."""

    version: int


class Scripted:
    """An evaluator by whose word version v succeeds in as many of its starts as `script[v]` says."""

    def __init__(self, script):
        self.script = script

    def play(self, weights, starts, mode):
        k = self.script[weights.version]
        return Pending.done(
            [
                PlayedEpisode(start=start, instruction="", success=i < k, num_steps=1, num_decisions=1)
                for i, start in enumerate(starts)
            ]
        )

    def take_spans(self):
        return []


def scripted(monkeypatch, *script):
    monkeypatch.setattr(LocalEvaluator, "play", Scripted(script).play)


def validated(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["k"]) for line in lines if line["kind"] == "validation"]


def curve(*options, folder=None, script=(0, 1, 3, 3, 2, 0)):
    config = toy_config("eval.during_every=1", "eval.during_starts=1", *options)
    return ValidationCurve(config, Scripted(script), lambda _: None, folder)


@pytest.mark.parametrize(
    ("rates", "longest"),
    [([], 0), ([0.0], 0), ([0.1, 0.2], 0), ([0.2, 0.2, 0.1], 2), ([0.3, 0.1, 0.4, 0.4], 1), ([0.2, 0.1, 0.1, 0.3], 2)],
)
def test_patience_counts_points_that_were_not_better(rates, longest):
    assert longest_wait(rates) == longest


def test_the_best_is_the_highest_and_the_latest_of_equal_ones(tmp_path):
    judged = curve("eval.patience=3", folder=tmp_path)
    seen = []

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "v").write_text(str(version))

    for version in range(6):
        judged.begin(Version(version), save)
        judged.finish()
        seen.append((judged.best, judged.exhausted, (tmp_path / BEST / "policy" / "v").read_text()))
    assert seen == [(0, False, "0"), (1, False, "1"), (2, False, "2"), (3, False, "3"), (3, False, "3"), (3, True, "3")]
    point = json.loads((tmp_path / BEST / "validation.json").read_text())
    assert (point["iteration"], point["k"], point["n"], point["mode"]) == (3, 3, 3, "sampled")
    assert judged.best_of([0, 1, 4, 9], 2) == {1, 4} and judged.best_of([0, 1], 0) == set()
    again = curve("eval.patience=3")
    again.load_state_dict(json.loads(json.dumps(judged.state_dict())))
    assert again.best == 3 and again.exhausted


def judge(judged, *versions):
    """Begin and finish the points of these versions; what they save is their number."""
    for version in versions:

        def save(folder: Path, version: int = version) -> None:
            folder.mkdir()
            (folder / "v").write_text(str(version))

        judged.begin(Version(version), save)
        judged.finish()


def kept(folder):
    file = folder / BEST / "policy" / "v"
    return int(file.read_text()) if file.exists() else None


def test_a_replay_that_differs_keeps_the_weights_that_its_points_name(tmp_path, caplog):
    first = curve(folder=tmp_path, script=(0, 2, 1, 3, 3))
    first.resume()
    judge(first, 0, 1, 2)
    state = json.loads(json.dumps(first.state_dict()))
    first.checkpointed()
    judge(first, 3, 4)
    assert first.best == kept(tmp_path) == 4
    again = curve(folder=tmp_path, script=(0, 0, 0, 1, 0, 3, 0))  # killed; from the checkpoint on all goes otherwise
    again.load_state_dict(state)
    again.resume()
    assert again.best == kept(tmp_path) == 1
    judge(again, 3, 4)
    assert again.best == kept(tmp_path) == 1
    judge(again, 5, 6)
    assert again.best == kept(tmp_path) == 5
    again.checkpointed()
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "candidate"]
    anew = curve(folder=tmp_path)  # no checkpoint: training begins again
    anew.resume()
    assert anew.best is None and kept(tmp_path) is None and not caplog.records


def test_lost_weights_are_named_and_the_best_is_chosen_among_later_ones(tmp_path, caplog):
    first = curve(folder=tmp_path, script=(0, 3, 1))
    judge(first, 0, 1, 2)
    shutil.rmtree(tmp_path / BEST)
    again = curve(folder=tmp_path, script=(0, 0, 0, 1, 2, 0))
    again.load_state_dict(first.state_dict())
    again.resume()
    assert "the weights after iteration 1" in caplog.text and again.best is None
    judge(again, 3, 4, 5)
    assert again.best == kept(tmp_path) == 4
    third = curve(folder=tmp_path)
    third.load_state_dict(json.loads(json.dumps(again.state_dict())))
    third.resume()
    assert third.best == kept(tmp_path) == 4


def kill_at(patch, iteration):
    """Interrupt training after an iteration's record."""
    real = rl_stages.train

    def killed(config, workers, reward, curriculum, run, callbacks):
        def stop(record):
            if record["iteration"] == iteration:
                raise KeyboardInterrupt

        return real(config, workers, reward, curriculum, run, [*callbacks, stop])

    patch.setattr(rl_stages, "train", killed)


def test_a_run_killed_behind_a_better_point_ends_with_the_best_of_its_own_curve(tmp_path, monkeypatch):
    config, run = tiny_config(*EVERY, "num_iterations=6", "checkpoint_every=4"), tmp_path / "run"
    play(config, run, "demos", "sft", "reward")

    with monkeypatch.context() as patch:
        scripted(patch, 0, 2, 1, 0, 3, 0)
        kill_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            play(config, run, "train")
    assert checkpoint_iteration(run / "checkpoints" / BEST) == 4  # the last checkpoint has four iterations
    scripted(monkeypatch, 0, 2, 1, 0, 1, 1, 0)
    play(config, run)
    assert validated(run) == [(0, 0), (1, 2), (2, 1), (3, 0), (4, 1), (5, 1), (6, 0)]
    assert checkpoint_iteration(run / "checkpoints" / BEST) == 1
    assert json.loads((run / "summary.json").read_text())["best"]["iteration"] == 1
    short = tmp_path / "short"
    play(tiny_config(DENSE, "num_iterations=1"), short, *STORY)
    assert weights(run / "checkpoints" / BEST / "policy") == weights(short / "policy")


def test_checkpoints_are_kept_by_age_and_by_value(tmp_path):
    def write_x(folder: Path) -> None:
        (folder / "x").write_text("x")

    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, write_x, keep=2, protected={2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004", "step_000005"]


def test_the_last_weights_are_judged_and_the_final_evaluation_plays_best_and_last(tmp_path, monkeypatch):
    scripted(monkeypatch, 0, 1, 3, 2, 1, 2)
    config, run = tiny_config(*EVERY, "keep_checkpoints=1", "keep_best_checkpoints=1"), tmp_path / "run"
    play(config, run)
    assert validated(run) == [(0, 0), (1, 1), (2, 3), (3, 2), (4, 1), (5, 2)]  # the fifth ends training
    best = chosen_checkpoint(run, "best")
    assert best.name == "best" and checkpoint_iteration(best) == 2
    assert policy_folder(best) == best / "policy"  # where reachrl.load_policy reads it
    # The weights are those after two updates: what a run of two iterations ends with.
    short = tmp_path / "short"
    play(tiny_config(DENSE, "num_iterations=2"), short)
    assert weights(best / "policy") == weights(short / "policy") != weights(run / "policy")
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_000002", "step_000005"]
    played = json.loads((run / "eval" / "best.json").read_text())
    assert played["sampled"] == json.loads((short / "eval" / "after.json").read_text())["sampled"]
    summary = json.loads((run / "summary.json").read_text())["best"]
    assert (summary["iteration"], summary["of"], summary["validation"]["k"]) == (2, 5, 3)
    assert summary["success"]["sampled"]["k"] == played["sampled"]["k"]
    assert "after iteration 2 of 5, on the held-out starts" in (run / "report.html").read_text()


def test_where_the_last_weights_are_the_best_they_play_once(tmp_path, monkeypatch):
    scripted(monkeypatch, 0, 0, 0, 0, 0, 1)
    run = tmp_path / "run"
    play(tiny_config(*EVERY, "eval.during_every=2"), run)  # the fifth is not due, but the last
    assert validated(run) == [(0, 0), (2, 0), (4, 0), (5, 1)]
    assert not (run / "eval" / "best.json").exists()
    assert weights(run / "checkpoints" / BEST / "policy") == weights(run / "policy")
    assert json.loads((run / "summary.json").read_text())["best"]["iteration"] == 5


def test_a_killed_run_keeps_the_best_and_the_patience(tmp_path, monkeypatch):
    scripted(monkeypatch, 1, 2, 1, 2, 0, 0, 1, 3)
    options = (*EVERY, "num_iterations=7")
    config, whole, cut = tiny_config(*options, "eval.patience=3"), tmp_path / "whole", tmp_path / "cut"
    play(config, whole)
    # Points 2, 3 and 4 were not better than 1: known as iteration 5 begins, which is the last.
    assert [line["iteration"] for line in train_lines(whole)] == [0, 1, 2, 3, 4, 5]
    assert validated(whole) == [(0, 1), (1, 2), (2, 1), (3, 2), (4, 0), (5, 0), (6, 1)]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["best"]["iteration"], summary["best"]["of"]) == (3, 6)
    play(config, cut, "demos", "sft", "reward")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            play(config, cut, "train")
    play(config, cut)
    assert validated(cut) == validated(whole) and train_lines(cut) == train_lines(whole)
    assert weights(cut / "checkpoints" / BEST / "policy") == weights(whole / "checkpoints" / BEST / "policy")
    # More patience opens training again; what was judged stays.
    play(tiny_config(*options, "eval.patience=9"), cut)
    assert validated(cut) == [*validated(whole), (7, 3)] and checkpoint_iteration(cut / "checkpoints" / BEST) == 7


def test_a_branch_takes_the_best_along(tmp_path, monkeypatch):
    scripted(monkeypatch, 0, 2, 1, 0, 0, 0)
    config, run = tiny_config(*EVERY, "keep_checkpoints=9"), tmp_path / "run"
    play(config, run, "demos", "sft", "reward", "train")
    branch(run / "checkpoints" / "step_000004", config, tmp_path / "branch")
    assert checkpoint_iteration(tmp_path / "branch" / "checkpoints" / BEST) == 1
    shutil.rmtree(tmp_path / "branch")


def test_a_process_beside_training_finds_what_the_own_one_finds(tmp_path):
    curves = []
    for number, envs in enumerate((0, 2)):
        run = tmp_path / str(number)
        play(tiny_config(*EVERY, "num_iterations=2", f"backend.evaluator_envs={envs}"), run, *STORY)
        curves.append((validated(run), train_lines(run), weights(run / "checkpoints" / BEST / "policy")))
    assert curves[0] == curves[1] and len(curves[0][0]) == 3


STORY = ("demos", "sft", "reward", "train")


@pytest.mark.parametrize("option", ["eval.patience=2", "keep_best_checkpoints=1"])
def test_what_chooses_must_be_measured(option):
    with pytest.raises(ConfigError, match=f"{option} goes by success on validation starts"):
        toy_config(option)


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
