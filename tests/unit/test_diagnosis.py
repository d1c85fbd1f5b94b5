"""A run that does not learn says why: one made-on-purpose cause at a time, on records and in tiny runs."""

import logging
import weakref

import numpy as np
import pytest
from tiny_run import play, tiny_config

from reachrl.backends.policy_loading import saved_policy
from reachrl.config.loading import load_config
from reachrl.demos.shard import write_shard
from reachrl.demos.store import TrajectoryStore, finish_store
from reachrl.iteration_record import episode_figures
from reachrl.pipeline.warm_start import outline
from reachrl.report.diagnosis import Explainer, diagnose
from reachrl.rollout.action_figures import action_figures
from reachrl.types import Episode, Start, Trajectory

AFTER = 4
DEMOS = {"length_mean": 9.0, "length_max": 14, "gripper/early": 0.95}


def tasks(**counts):
    """The counts of each task, as records hold them."""
    successes = {f"task_successes/{task}": k for task, (k, _) in counts.items()}
    return successes | {f"task_episodes/{task}": n for task, (_, n) in counts.items()}


def row(iteration, k, **changes):
    """A training record of 16 episodes, 8 of each task, of which `k` succeed."""
    healthy = {
        "kind": "train",
        "iteration": iteration,
        "success_k": k,
        "success_n": 16,
        "success_uniform": k / 16,
        **tasks(near=(k - k // 2, 8), far=(k // 2, 8)),
        "truncated": 1 - k / 16,
        "progress/end": 0.4,
        "progress/late_gain": 0.0,
        "gripper/early": 0.9,
        "actions/at_bounds": 0.3,
        "actions/beyond_bounds": 0.0,
        "actions/size": 0.5,
        "entropy": 3.0,
        "kl": 0.01,
        "changed_weights": 1.0,
        "policy_steps": 4,
        "explained_variance": 0.5,
        "warming_up": False,
        "audit/alarm": 0.0,
        "audit/return_correlation": 0.4,
        "curriculum_success/near": 0.2,
        "curriculum_success/far": 0.1,
    }
    return healthy | changes


def failing(count=6, **changes):
    return [row(i, 0, **changes) for i in range(count)]


def names(rows, **options):
    found = diagnose(rows, after=AFTER, demos=DEMOS, max_steps=30, **options)
    assert found is not None
    return found.trouble, [each.name for each in found.findings]


@pytest.mark.parametrize(
    ("changes", "cause", "says"),
    [
        ({}, "never a success", "easiest task by the curriculum's estimate is near; the experts need 9 decisions"),
        ({"gripper/early": 0.05}, "gripper inverted", "it is open to 5%, in the demonstrations to 95%"),
        (
            {"actions/beyond_bounds": 0.97, "actions/at_bounds": 0.98, "actions/size": 51.3},
            "wrong action statistics",
            "97% of the action numbers lie beyond what the environment carries out",
        ),
        ({"actions/size": 0.005}, "wrong action statistics", "the arm hardly moves"),
        ({"progress/end": 0.8, "progress/late_gain": 0.2}, "horizon too short", "come 80% of the way and gain 20%"),
        ({"kl": 0.0, "changed_weights": 0.0}, "frozen policy", "no weight of it has moved"),
        ({"policy_steps": 0, "kl": None}, "frozen policy", "no weight of it has moved"),
        ({"explained_variance": -0.2}, "critic blind", "at best -0.20"),
        ({"audit/alarm": 1.0}, "reward parted from success", "parted from success"),
        ({"audit/return_correlation": -0.3}, "reward parted from success", "parted from success"),
    ],
)
def test_a_cause_is_named(changes, cause, says):
    found = diagnose(failing(**changes), after=AFTER, demos=DEMOS, max_steps=30)
    assert found is not None and found.trouble == "no success"
    assert {each.name for each in found.findings} == {cause, "never a success"}
    assert says in found.text()
    assert found.text().count("(1) ") == found.text().count("(3) ") == 1 and "(4)" not in found.text()
    assert "none of the 64 episodes of the last 4 iterations succeeded (tasks: near 0/32, far 0/32;" in found.text()
    assert "entropy 3.00 nats a token; 100% of the episodes cut off" in found.text()


def test_what_a_run_has_already_is_not_advised():
    sparse = diagnose(failing(), after=AFTER, demos=DEMOS, max_steps=30)
    dense = diagnose(failing(**{"reward/process": 0.1}), after=AFTER, demos=DEMOS, max_steps=30)
    assert sparse is not None and "reward.kind=process" in sparse.text()
    assert dense is not None and "reward.kind=process" not in dense.text()
    assert dense.text().count("sft.epochs") == 1  # each advice once


def test_a_limit_that_the_experts_hardly_keep_is_too_short():
    found = diagnose(failing(), after=AFTER, demos=DEMOS, max_steps=9)
    assert found is not None and "the experts' episodes take 9 of 9 decisions" in found.text()


def test_an_entropy_that_collapsed_is_named():
    rows = [row(i, 4, entropy=3.0 - 0.5 * i) for i in range(6)] + [row(6 + i, 0, entropy=0.05) for i in range(4)]
    trouble, causes = names(rows)
    assert trouble == "no success" and "entropy collapse" in causes


def test_a_warm_up_is_no_frozen_policy():
    _, causes = names(failing(warming_up=True, policy_steps=0, kl=None))
    assert "frozen policy" not in causes


def test_a_fall_is_told_from_the_curriculums_choice():
    rows = [row(i, 12) for i in range(6)] + [row(6 + i, 3) for i in range(4)]
    found = diagnose(rows, after=AFTER)
    assert found is not None and found.trouble == "falling"
    assert "success fell to 12 of 64 episodes in the last 4 iterations, from 48 of 64 before" in found.text()
    # Drawn by a curriculum that now asks for the hard ones: the uniform rate stands still.
    assert diagnose([each | {"success_uniform": 0.5} for each in rows], after=AFTER) is None


def test_a_fall_is_measured_from_the_best_iterations_in_a_row_however_long_ago():
    successes = [2, 3, 12, 14, 12, 13, 9, *[7] * 40, 3, 2, 4, 3]
    rows = [row(i, k) for i, k in enumerate(successes)]
    rows.insert(3, {"kind": "train", "iteration": 3, "success_k": 0, "success_n": 0})  # no episode ended
    found = diagnose(rows, after=AFTER)
    assert found is not None
    assert "success fell to 12 of 64 episodes in the last 4 iterations, from 51 of 64 before" in found.text()


class Record(dict):
    """A record that can be referred to weakly."""


def test_what_is_kept_of_a_run_does_not_grow_with_it():
    explainer, given = Explainer([], after=AFTER, demos=DEMOS, max_steps=30), []
    for iteration in range(50):
        record = Record(row(iteration, 6))
        explainer.observe(record)
        given.append(weakref.ref(record))
    del record
    assert sum(each() is not None for each in given) == 2 * AFTER


def test_an_impossible_task_is_named_beside_ones_that_succeed():
    rows = [row(i, 6, **tasks(near=(6, 8), far=(0, 8))) for i in range(6)]
    trouble, causes = names(rows)
    assert (trouble, causes) == ("a task without success", ["impossible task"])
    young = [each | tasks(near=(6, 8), far=(0, 4)) for each in rows]
    assert diagnose(young, after=AFTER) is None


@pytest.mark.parametrize(
    "rows",
    [
        [],
        failing(3),
        [row(i, min(16, 2 + i)) for i in range(20)],
        [row(i, 8 + (-1) ** i * 3) for i in range(20)],
        [row(i, 0) for i in range(3)] + [row(3, 1)],
        [row(i, 1, explained_variance=-1.0, entropy=0.01) for i in range(9)],  # odd figures, but it succeeds
        [{"kind": "train", "iteration": i, "success_k": 0, "success_n": 0} for i in range(9)],  # no episode ended
    ],
)
def test_a_healthy_or_young_run_is_silent(rows):
    assert diagnose(rows, after=AFTER, demos=DEMOS, max_steps=30) is None


def test_a_trouble_is_told_once_and_not_again_after_a_resume():
    explainer, told = Explainer([], after=AFTER, demos=DEMOS, max_steps=30), []
    for each in failing(9):
        told.append(explainer.observe(each) is not None)
    assert told == [False] * 3 + [True] + [False] * 5
    assert Explainer(failing(6), after=AFTER, demos=None, max_steps=30).observe(failing(7)[-1]) is None


def test_records_of_earlier_versions_are_told_of_too():
    rows = [{"kind": "train", "iteration": i, "success_k": 0, "success_n": 8} for i in range(5)]
    found = diagnose(rows, after=AFTER)
    assert found is not None and [each.name for each in found.findings] == ["never a success"]
    assert "no further figures" in found.text()


class Rolled:
    """What `episode_figures` reads of a rollout."""

    def __init__(self, lengths, progress, opening):
        count = len(lengths)
        top = max(lengths)
        self.truncated = np.zeros((top, count), bool)
        self.progress = np.full((top, count, 2), np.nan, np.float32)
        self.ee_state = np.zeros((top, count, 4), np.float32)
        self.executed = np.ones((top, count), np.int32)
        self.final_rows = np.array([[length - 1, n] for n, length in enumerate(lengths)])
        for n, length in enumerate(lengths):
            self.truncated[length - 1, n] = n > 0  # the first succeeds
            self.progress[:length, n, 1] = progress[n][:length]
            self.ee_state[:length, n, 3] = opening[n][:length]
        self.episodes = tuple(
            Episode(
                start=Start("near" if n < 2 else "far", "train", 0),
                success=n == 0,
                num_steps=length,
                num_decisions=length,
                env=n,
            )
            for n, length in enumerate(lengths)
        )


def test_the_figures_of_episodes():
    ramp = np.linspace(0.1, 0.8, 8)
    figures = episode_figures(
        Rolled([4, 8, 8], [ramp, ramp, np.full(8, 0.5)], [np.ones(8), [1, 1, 0.4] + [0] * 5, np.ones(8)])  # pyright: ignore
    )
    assert {name: count for name, count in figures.items() if name.startswith("task_")} == tasks(
        near=(1, 2), far=(0, 1)
    )
    assert figures["truncated"] == pytest.approx(2 / 3)
    assert figures["progress/end"] == pytest.approx((0.8 + 0.5) / 2)
    assert figures["progress/late_gain"] == pytest.approx((0.2 + 0.0) / 2)  # two of eight decisions
    assert figures["gripper/early"] == pytest.approx((1 + 0.4 + 1) / 3)


def test_the_figures_of_actions():
    class Decoder:
        def decode_actions(self, ids, mask):
            return ids.numpy().reshape(-1, 1, 2) / 10

    class Some:
        token_ids = np.array([[[10, 0], [-10, 5], [100, -30]], [[4, 4], [99, 99], [0, 0]]])
        token_mask = np.ones((2, 3, 2), bool)
        valid = np.array([[True, True, True], [True, False, True]])
        malformed = np.zeros((2, 3), bool)

        action_bounds = np.array([[-1, -2], [1, 2]], np.float32)

    figures = action_figures(Some(), Decoder())  # pyright: ignore[reportArgumentType]
    # Of ten numbers: 1, -1, 10 and -3 at or beyond their bounds, the last two clipped.
    assert figures["actions/at_bounds"] == pytest.approx(0.4) and figures["actions/beyond_bounds"] == pytest.approx(0.2)
    assert figures["actions/size"] == pytest.approx((1 + 0 + 1 + 0.25 + 10 + 1.5 + 0.4 + 0.2 + 0 + 0) / 10)


def test_the_outline_of_demonstrations(tmp_path):
    def shown(length, opening):
        state = np.zeros((length + 1, 4), np.float32)
        state[3:, 3] = opening
        return Trajectory(
            start=Start("near", "train", 0), instruction="go", actions=np.zeros((length, 2), np.float32),
            images={"camera": np.zeros((length + 1, 8, 8, 3), np.uint8)}, ee_state=state, success=True, source="expert",
        )  # fmt: skip

    write_shard(tmp_path / "near.parquet", [shown(4, 1.0), shown(8, 0.5)])
    store = finish_store(tmp_path, ["near.parquet"])
    assert isinstance(store, TrajectoryStore)
    assert outline(store) == {"trajectories": 2, "length_mean": 6.0, "length_max": 8, "gripper/early": 0.75}


def test_a_run_with_statistics_a_hundred_times_too_large_says_so(tmp_path, caplog):
    config, run = tiny_config("explain_after=2"), tmp_path / "run"
    play(config, run, "demos", "sft", "reward")
    policy = saved_policy(config, run / "sft" / "policy")
    large = np.full(4, 100.0)
    policy.set_action_stats(-large, large, np.ones(4, bool))
    policy.save_pretrained(run / "sft" / "policy")
    with caplog.at_level(logging.WARNING, logger="reachrl.loop"):
        play(config, run, "train", "report")
    told = [record.getMessage() for record in caplog.records if "Likely cause" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("iteration 1: none of the ")
    assert "wrong action statistics" in told[0] and "check the action statistics" in told[0]
    assert "Wrong action statistics" in (run / "report.html").read_text()


def test_a_run_that_succeeds_is_silent(tmp_path, caplog):
    config = tiny_config(
        "explain_after=2", "env.radius=0.2", "env.max_steps=15", "rollout.num_steps=30", "env.num_envs=4"
    )
    with caplog.at_level(logging.WARNING, logger="reachrl.loop"):
        play(config, tmp_path / "run", "demos", "sft", "reward", "train", "report")
    assert not [record for record in caplog.records if "Likely cause" in record.getMessage()]
    assert "Likely" not in (tmp_path / "run" / "report.html").read_text() and load_config("toy").explain_after == 10
