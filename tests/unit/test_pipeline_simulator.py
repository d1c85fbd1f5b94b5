"""The pipeline simulator against closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pipeline_example import LAYOUT, STAGES

from pipeline_layout import Layout, Stages
from pipeline_rollout import collect_rollouts
from pipeline_simulator import GPU_COUNTS, simulate, table_openvla

# 600 decisions, of which 10 make 10 minibatches of 64 and 3 epochs 30 steps; two learners, each sends half twice.
ROLLOUT_S = 20 * (0.3 + 10 * 0.017 + 10 / 4 * 0.11 + 0.029 + 0.0053)
REWARD_S = 600 * 0.0021 / 2
SCORE_S = 600 * 0.0031 / 2
UPDATE_S = 600 * 3 * 0.0057 / 2 / 0.8 + 30 * 0.03
SYNC_S = 0.7 + 0.3


# --- the iteration ----------------------------------------------------------------------------------


def test_on_policy_every_stage_adds_up():
    outcome = simulate(STAGES, LAYOUT)
    expected = ROLLOUT_S + REWARD_S + SCORE_S + UPDATE_S + SYNC_S
    assert outcome.iteration_s == pytest.approx(expected)
    assert outcome.decisions_per_s == pytest.approx(600 / expected)
    assert outcome.actor_idle == pytest.approx(1 - 20 * 0.47 / expected)
    assert outcome.learner_idle == pytest.approx(1 - (REWARD_S + SCORE_S + UPDATE_S) / expected)
    assert outcome.core_idle == pytest.approx(1 - 20 * 10 * 0.11 / 4 / expected)


def test_reward_workers_score_beside_the_learners():
    for workers in (1, 2, 7):
        outcome = simulate(STAGES, replace(LAYOUT, reward_workers=workers))
        beside = max(600 * 0.0021 / workers, SCORE_S)
        assert outcome.iteration_s == pytest.approx(ROLLOUT_S + beside + UPDATE_S + SYNC_S)
        assert outcome.learner_idle == pytest.approx(1 - (SCORE_S + UPDATE_S) / outcome.iteration_s)


@pytest.mark.parametrize(("learners", "share"), [(1, 0.0), (2, 1.0), (4, 1.5), (64, 63 / 32)])
def test_an_all_reduce_moves_twice_what_a_learner_does_not_own(learners, share):
    stages = Stages(update_row_s=0.01, gradient_bytes=8e9, gradient_bytes_per_s=4e9)
    layout = Layout(rows=(13,), num_steps=10, cores=16, learners=learners, epochs=2, minibatch=64)
    # 130 rows are 3 minibatches, twice.
    assert simulate(stages, layout).iteration_s == pytest.approx(130 * 2 * 0.01 / learners + 6 * share * 2.0)


@pytest.mark.parametrize("slower", [1.0, 0.1, 10.0])
def test_ahead_the_longer_of_rollout_and_learning_sets_the_pace(slower):
    stages = replace(STAGES, update_row_s=STAGES.update_row_s * slower)
    outcome = simulate(stages, replace(LAYOUT, ahead=True))
    learning = REWARD_S + SCORE_S + (UPDATE_S - 0.9) * slower + 0.9
    assert outcome.iteration_s == pytest.approx(max(ROLLOUT_S, learning) + SYNC_S)
    assert outcome.learner_idle == pytest.approx(1 - learning / outcome.iteration_s)
    assert outcome.actor_idle == pytest.approx(1 - 20 * 0.47 / outcome.iteration_s)


def test_ahead_changes_nothing_but_the_overlap():
    # What takes no time cannot be overlapped.
    stages = replace(STAGES, reward_row_s=0, score_row_s=0, update_row_s=0, gradient_bytes=0)
    assert simulate(stages, replace(LAYOUT, ahead=True)).iteration_s == pytest.approx(
        simulate(stages, LAYOUT).iteration_s
    )


def test_colocated_devices_decode_and_learn_in_turn_and_are_handed_over_twice():
    outcome = simulate(STAGES, replace(LAYOUT, placement="colocated"))
    learning = REWARD_S + SCORE_S + UPDATE_S
    expected = ROLLOUT_S + learning + SYNC_S + 2 * 1.9
    assert outcome.iteration_s == pytest.approx(expected)
    # Of three devices all decode and two learn.
    assert outcome.actor_idle == pytest.approx(1 - (3 * 20 * 0.47 + 2 * learning) / (3 * expected))
    assert outcome.learner_idle == outcome.actor_idle


@pytest.mark.parametrize("ahead", [False, True])
def test_with_variation_the_mean_is_that_of_the_rollouts_after_the_first(ahead):
    stages = replace(STAGES, env_step_cv=0.8)
    layout = replace(LAYOUT, ahead=ahead)
    iterations = 6
    rollouts = collect_rollouts(stages, layout, iterations + ahead, 3)
    seconds = [rollout.seconds for rollout in rollouts]
    learning = REWARD_S + SCORE_S + UPDATE_S
    # Ahead, the first two rollouts come before the first weights.
    each = [max(s, learning) if ahead else s + learning for s in seconds[1 + ahead :]]
    assert len(each) == iterations - 1
    outcome = simulate(stages, layout, iterations=iterations, seed=3)
    assert outcome.iteration_s == pytest.approx(np.mean(each) + SYNC_S)
    core_s = np.mean([rollout.core_s for rollout in rollouts[1 + ahead :]])
    assert outcome.core_idle == pytest.approx(1 - core_s / (3 * 4 * outcome.iteration_s))


# --- the bottleneck ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("decoding", {"decode_row_s": 3.0}),
        ("simulation", {"env_step_s": 9.0}),
        ("simulation", {"env_wait_s": 30.0}),  # although the cores idle
        ("learning", {"update_row_s": 1.0}),
        ("learning", {"gradient_bytes": 1e11}),
        ("reward", {"reward_row_s": 1.0}),
        ("sync", {"sync_bytes": 1e13}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_stage_made_very_slow_is_the_bottleneck(name, changes, ahead):
    assert simulate(replace(STAGES, **changes), replace(LAYOUT, ahead=ahead)).bottleneck == name


def test_on_policy_with_one_group_a_stage_gains_all_of_its_time():
    gains = simulate(STAGES, LAYOUT).shorter_s
    simulation = 20 * (10 / 4 * 0.11 + 0.029 + 0.0053)
    expected = {
        "decoding": 20 * 0.47,
        "simulation": simulation,
        "learning": SCORE_S + UPDATE_S,
        "reward": REWARD_S,
        "sync": SYNC_S,
    }
    assert gains == pytest.approx(expected)


def test_the_busiest_stage_is_not_the_bottleneck_where_another_is_as_long_beside_it():
    # Learning takes 9.9 of 11 s and simulation 10; without either the other remains. Only the sync is in the way.
    stages = Stages(env_step_s=1.0, score_row_s=0.99, sync_fixed_s=1.0)
    outcome = simulate(stages, Layout(rows=(1,), num_steps=10, cores=1, ahead=True))
    assert outcome.bottleneck == "sync"
    assert outcome.learner_idle == pytest.approx(1 - 9.9 / 11)
    assert outcome.shorter_s == pytest.approx(
        {"decoding": 0, "simulation": 0.1, "learning": 0, "reward": 0, "sync": 1}, abs=1e-9
    )


def test_stages_that_hide_each_other_exactly_are_balanced():
    stages = Stages(env_step_s=1.0, score_row_s=1.0)
    assert simulate(stages, Layout(rows=(1,), num_steps=10, cores=1, ahead=True)).bottleneck == "balanced"


def test_an_infinitely_fast_stage_takes_no_cores_either():
    # One core for both: without one of them the other runs as if alone.
    stages = Stages(decode_fixed_s=1.0, env_step_s=2.0)
    layout = Layout(rows=(3, 3), num_steps=10, cores=1, actors_per_node=2, decode_on_cpu=True)
    gains = simulate(stages, layout).shorter_s
    assert gains["decoding"] == pytest.approx(2 * 10 * 1.0)
    assert gains["simulation"] == pytest.approx(2 * 10 * 3 * 2.0)


# --- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ()}, "no actor"),
        ({"rows": (4, 0)}, "without environments"),
        ({"groups": 11}, "10 environments of an actor cannot be split into 11 groups"),
        ({"placement": "colocated", "ahead": True}, "ahead needs placement 'split'"),
        ({"placement": "colocated", "learners": 4}, "4 learners cannot be colocated with 3 actors"),
        ({"placement": "apart"}, "'apart', not 'colocated' or 'split'"),
        ({"learners": 65}, "a minibatch of 64 rows leaves some of 65 learners none"),
        ({"cores": 0}, "cores is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"reward_workers": -1}, "reward_workers is -1"),
        ({"decode_on_cpu": True, "decode_cores": 5}, "decode_cores is 5, but a node has 4 cores"),
    ],
)
def test_an_impossible_layout_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LAYOUT, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_step_s": -1.0}, "env_step_s is -1.0"),
        ({"decode_row_s": math.nan}, "decode_row_s is nan"),
        ({"learner_efficiency": 1.2}, "learner_efficiency is 1.2"),
        ({"sync_bytes_per_s": 0.0}, "a bandwidth is 0"),
    ],
)
def test_impossible_times_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGES, **changes)


def test_nothing_to_simulate_is_told():
    with pytest.raises(ValueError, match="no stage takes any time"):
        simulate(Stages(), LAYOUT)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        simulate(STAGES, LAYOUT, iterations=1)


# --- the table --------------------------------------------------------------------------------------


def test_the_table_has_the_best_split_and_the_colocated_pipeline(capsys):
    # Learning takes three times the rollout: 6 of 8 GPUs learn, and each of the other 2 has half of the cores.
    stages = Stages(decode_row_s=0.01, score_row_s=0.03)
    found = table_openvla(stages, rows=16, num_steps=10, node_cores=40, groups=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(found) == len(lines) - 2 == 2 * len(GPU_COUNTS)
    for index, total in enumerate((8, 16, 32, 64, 128, 256, 512)):
        (_, split, fast), (_, colocated, slow) = found[2 * index : 2 * index + 2]
        assert (len(split.rows), split.learners, split.cores) == (total // 4, total * 3 // 4, 20)
        assert (len(colocated.rows), colocated.learners, colocated.cores) == (total, total, 5)
        # A GPU alone makes 25 decisions/s; none idles in either.
        assert fast.decisions_per_s == pytest.approx(25 * total)
        assert slow.decisions_per_s == pytest.approx(25 * total)
        assert (
            f"| {total} | {total // 4} act, {total * 3 // 4} learn, ahead | {25 * total:,}.0 |" in lines[2 + 2 * index]
        )
        assert lines[3 + 2 * index].startswith(f"| {total} | colocated | {25 * total:,}.0 |")


def test_the_table_takes_the_best_of_the_splits(capsys):
    for decode_row_s, learners in ((0.07, 1), (0.03, 2), (0.01, 4), (0.002, 6)):
        stages = Stages(decode_row_s=decode_row_s, score_row_s=0.01)
        (_, split, _), _ = table_openvla(stages, rows=16, num_steps=10, node_cores=40, groups=1, gpus=(8,))
        assert split.learners == learners


def test_the_table_wants_whole_nodes():
    with pytest.raises(ValueError, match="12 GPUs are not whole nodes of 8"):
        table_openvla(STAGES, rows=16, num_steps=10, node_cores=40, gpus=(12,))
