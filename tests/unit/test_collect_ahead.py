"""Rollouts one update old: where they are, what they were sampled with, and that a resumed run has the same."""

from types import SimpleNamespace

import pytest
from toy_policy import toy_config, toy_policy

from reachrl.loop import train
from reachrl.registry import build
from reachrl.rewards.task import TaskReward
from reachrl.run.directory import Run
from reachrl.run.spans import Span, Timelines
from reachrl.validation import ValidationCurve

OPTIONS = (
    "num_iterations=6",
    "checkpoint_every=3",
    "rollout.num_steps=20",
    "env.radius=0.2",
    "algorithm.warmup_iterations=0",
)


class Interrupted(Exception):
    pass


def run_training(config, folder, warm, interrupt_at=None):
    """Train, perhaps until an interruption; returns the records so far."""

    def iteration(record):
        if record["iteration"] == interrupt_at:
            raise Interrupted

    curriculum = build(
        "curricula", config.curriculum, tasks=config.env.tasks, num_starts=config.env.num_train_starts, seed=config.seed
    )
    with Run.open(folder, {}, tensorboard=False) as run:
        try:
            with build("backends", config.backend).open(config, warm) as workers:
                train(config, workers, TaskReward(), curriculum, run, [iteration])
        except Interrupted:
            pass
        return [
            {key: value for key, value in record.items() if not key.startswith("seconds/")}
            for record in run.metrics.read("train")
        ]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm") / "policy"
    toy_policy(toy_config(), seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    config = toy_config(*OPTIONS, "collect_ahead=true", "algorithm.importance_cap=2.0", "algorithm.lr=1e-3")
    folder = tmp_path_factory.mktemp("whole") / "run"
    return config, run_training(config, folder, warm), folder


def test_weights_are_one_update_old_but_never_at_a_checkpoint(whole, warm, tmp_path):
    config, records, _ = whole
    assert [record["lag"] for record in records] == [0, 1, 1, 0, 1, 1]
    # The sampler's log-probs are those of the older weights, the learner's those of the newer.
    gaps = [abs(record["engine_kl"]) for record in records]
    assert all(gap < 1e-7 for gap, record in zip(gaps, records, strict=True) if not record["lag"])
    assert all(gap > 1e-4 for gap, record in zip(gaps, records, strict=True) if record["lag"])
    fresh = run_training(config.model_copy(update={"collect_ahead": False}), tmp_path / "fresh", warm)
    assert fresh[0] == records[0] and fresh[1]["success_k"] >= 0
    assert fresh[1]["loss/value"] != records[1]["loss/value"]  # another rollout


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_run_collects_the_same_rollouts_again(whole, warm, tmp_path, at):
    config, records, _ = whole
    run_training(config, tmp_path / "run", warm, interrupt_at=at)
    assert run_training(config, tmp_path / "run", warm) == records


def test_the_timeline_has_what_was_done_ahead():
    timelines = Timelines()
    # Iteration 0 lasts from 0 to 10; from 4 to 9 an actor collects ahead, which it tells in iteration 1.
    timelines.note(0, [Span("loop", "rollout", 0, 4), Span("loop", "update", 4, 10)], [Span("actor", "decode", 1, 3)])
    timelines.note(
        1, [Span("loop", "update", 10, 15)], [Span("actor", "decode", 4, 9), Span("learner", "update", 11, 15)]
    )
    iteration, spans = timelines.typical(ahead=True)
    assert iteration == 0 and [(s.who, s.start) for s in spans] == [
        ("loop", 0),
        ("loop", 4),
        ("actor", 1),
        ("actor", 4),
    ]
    iteration, spans = timelines.typical(ahead=False)
    assert iteration == 1 and [(s.who, s.start) for s in spans] == [("loop", 10), ("learner", 11)]


def test_validation_points_come_once_per_due_version():
    config = toy_config("eval.during_every=2", "eval.during_starts=3", "eval.temperatures=0")
    asked, logged = [], []

    class Evaluator:
        def play(self, weights, starts, mode):
            asked.append((weights.version, len(starts), mode))
            return SimpleNamespace(result=lambda: [])

        def take_spans(self):
            return []

    curve = ValidationCurve(config, Evaluator(), logged.append)
    for version in (0, 0, 1, 2, 3, 4):  # collecting ahead sends a version twice
        curve.begin(SimpleNamespace(version=version))
    assert asked == [(version, 3 * len(config.env.tasks), "greedy") for version in (0, 2, 4)]
    assert [record["iteration"] for record in logged] == [0, 2]  # each is waited for before the next begins
    curve.finish()
    curve.finish()
    assert [record["iteration"] for record in logged] == [0, 2, 4]
