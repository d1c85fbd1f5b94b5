"""Evaluation: every start once, outcomes independent of the number of environments, honest counts."""

import numpy as np
import pytest
from toy_policy import toy_config, toy_policy

from reachrl.config.train import EvalSection
from reachrl.envs.vector import VectorEnv
from reachrl.evaluate import compare, evaluate, heldout_starts, protocol_hash
from reachrl.functional.stats import wilson
from reachrl.registry import build
from reachrl.types import Start

CONFIG = EvalSection(num_starts=4, seed=11)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_outcomes_do_not_depend_on_the_number_of_environments(mode):
    config = toy_config()
    policy, starts = toy_policy(config), heldout_starts(config.env, CONFIG)
    records = []
    for count in (1, 3):
        with VectorEnv(config.env, count) as envs:
            result = evaluate(policy, envs, starts, mode=mode, config=CONFIG, record=lambda start: start.index == 0)
        assert [episode.start for episode in result.episodes] == starts
        records.append(result)
    for one, three in zip(records[0].episodes, records[1].episodes, strict=True):
        assert (one.success, one.num_steps) == (three.success, three.num_steps)
        assert bool(one.turns) == (one.start.index == 0)
        for a, b in zip(one.turns, three.turns, strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.action_ids, b.action_ids)
    # A recorded episode is the one that its actions give in a fresh environment.
    episode = records[0].episodes[0]
    env = build("envs", config.env)
    observation, _ = env.reset(options={"start": episode.start})
    for turn in episode.turns:
        np.testing.assert_array_equal(turn.image, observation["image"])
        observation, _, terminated, _, _ = env.step(turn.action)
    assert terminated == episode.success
    np.testing.assert_array_equal(episode.final_image, observation["image"])


def test_records_count_and_carry_intervals():
    config = toy_config()
    with VectorEnv(config.env, 2) as envs:
        result = evaluate(toy_policy(config), envs, heldout_starts(config.env, CONFIG), mode="sampled", config=CONFIG)
    record = result.record()
    assert record["n"] == 12 and record["k"] == sum(e["success"] for e in record["episodes"])
    assert tuple(record["wilson95"]) == wilson(record["k"], 12)
    assert sum(task["k"] for task in record["per_task"].values()) == record["k"]
    flipped = record | {"episodes": [e | {"success": not e["success"]} for e in record["episodes"]]}
    test = compare(record, flipped)
    assert (test.improved, test.worsened) == (12 - record["k"], record["k"])
    with pytest.raises(ValueError, match="same start states"):
        compare(record, record | {"episodes": record["episodes"][1:]})


def test_held_out_starts_are_the_evaluation_split_only():
    config = toy_config()
    starts = heldout_starts(config.env, CONFIG)
    assert len(set(starts)) == 12 and {start.split for start in starts} == {"eval"}
    assert Start("red-square", "eval", 0) in starts


def test_the_protocol_hash_covers_what_decides_an_outcome_and_nothing_else():
    base = protocol_hash(toy_config())
    for same in ("env.num_envs=7", "env.worker_timeout_s=5", "ppo.lr=1e-5", "seed=9", "env.num_train_starts=10"):
        assert protocol_hash(toy_config(same)) == base, same
    for other in (
        "env.max_steps=20",
        "env.tasks=red-square",
        "eval.num_starts=3",
        "eval.temperature=1.5",
        "eval.seed=1",
    ):
        assert protocol_hash(toy_config(other)) != base, other
