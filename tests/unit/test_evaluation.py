"""Evaluation: every start once, outcomes independent of the number of environments, honest counts."""

from types import SimpleNamespace

import numpy as np
import pytest
from toy_policy import toy_config, toy_policy

from reachrl.backends.base import Pending
from reachrl.cli.display import Display
from reachrl.config.train import EvalSection
from reachrl.demos.shard import iter_shard
from reachrl.envs.vector import VectorEnv
from reachrl.evaluation import compare, evaluate, heldout_starts, protocol_hash
from reachrl.functional.stats import wilson
from reachrl.pipeline.rl_stages import policy_trajectories
from reachrl.registry import build
from reachrl.rollout.episodes import EpisodePlayer, PlayedEpisode
from reachrl.run.directory import Run
from reachrl.streams import Stream, generator
from reachrl.types import SPLITS, Start
from reachrl.validation import ValidationCurve

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
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
    # A recorded episode is the one that its actions give in a fresh environment.
    episode = records[0].episodes[0]
    env = build("envs", config.env)
    observation, _ = env.reset(options={"start": episode.start})
    for turn in episode.turns:
        np.testing.assert_array_equal(turn.image, observation["images"]["camera"])
        observation, _, terminated, _, _ = env.step(turn.actions[0])
    assert terminated == episode.success
    np.testing.assert_array_equal(episode.final_observation.frames[0], observation["images"]["camera"])


def test_a_start_listed_twice_is_played_twice():
    config = toy_config()
    task = config.env.tasks[0]
    starts = [Start(task, "eval", index) for index in (0, 1, 0, 0, 2)]
    with VectorEnv(config.env, 2) as envs:
        player = EpisodePlayer(toy_policy(config), envs, mode="sampled", temperature=1.0, seed=3)
        episodes = player.play(starts)
        alone = player.play(starts[:1])
    assert [episode.start for episode in episodes] == starts
    for again in (episodes[0], episodes[2], episodes[3]):
        assert (again.success, again.num_steps) == (alone[0].success, alone[0].num_steps)


def test_the_reward_models_episodes_are_sampled_at_the_training_temperature(tmp_path):
    config = toy_config("rollout.temperature=0.02", "reward_model.rollouts_per_task=2", "env.num_train_starts=9")
    policy, display = toy_policy(config), Display(quiet=True)
    with Run.open(tmp_path / "run", {}, tensorboard=False) as run:
        policy.save_pretrained(run.sft / "policy")
        policy_trajectories(config, run, display)
        found = list(iter_shard(run.reward_model / "rollouts" / "policy.parquet"))
    starts = [one.start for one in found]
    with VectorEnv(config.env, 2) as envs:
        cold, warm = (
            EpisodePlayer(policy, envs, mode="sampled", temperature=temperature, seed=config.seed).play(
                starts, record=lambda _: True
            )
            for temperature in (0.02, 1.0)
        )
    assert len(found) == 6
    for one, expected, other in zip(found, cold, warm, strict=True):
        np.testing.assert_array_equal(one.actions, np.concatenate([turn.actions for turn in expected.turns]))
        assert not np.array_equal(one.actions[0], other.turns[0].actions[0])


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


class Player:
    """An evaluator that notes what it is to play."""

    def __init__(self):
        self.asked = []

    def play(self, weights, starts, mode):
        self.asked.append(list(starts))
        return Pending.done(
            [PlayedEpisode(start=start, instruction="", success=True, num_steps=1, num_decisions=1) for start in starts]
        )


def test_evaluations_during_training_play_neither_training_nor_test_starts():
    config = toy_config("eval.during_every=2", "eval.during_starts=3", "eval.num_starts=10")
    player, records = Player(), []
    curve = ValidationCurve(config, player, records.append)
    for version in range(4):
        curve.begin(SimpleNamespace(version=version))
    curve.finish()
    test = set(heldout_starts(config.env, config.eval))
    assert len(player.asked) == 2 and player.asked[0] == player.asked[1]
    assert {start.split for start in player.asked[0]} == {"validation"} and not test & set(player.asked[0])
    assert [(r["kind"], r["iteration"], r["n"]) for r in records] == [("validation", 0, 9), ("validation", 2, 9)]
    # Another split is another state in the simulator, not the same one under another name.
    env = build("envs", config.env)
    first = {
        split: env.reset(options={"start": Start(config.env.tasks[0], split, 0)})[0]["images"]["camera"].tobytes()
        for split in SPLITS
    }
    assert len(set(first.values())) == 3


def test_noise_knows_the_split():
    """A policy that sees nothing draws other actions in start 0 of each split, and those of the test as ever."""
    config = toy_config()
    policy, task = toy_policy(config), config.env.tasks[0]
    with VectorEnv(config.env, 1) as envs:
        player = EpisodePlayer(policy, envs, mode="sampled", temperature=1e6, seed=5)  # uniform, whatever is seen
        played = player.play([Start(task, split, 0) for split in SPLITS], record=lambda _: True)
    drawn = {each.start.split: each.turns[0].token_ids.tolist() for each in played}
    assert len({tuple(ids) for ids in drawn.values()}) == 3
    shape = (policy.num_action_tokens, policy.num_choices)
    expected = generator(5, Stream.EVALUATION_NOISE, task, 0, 0).gumbel(size=shape).argmax(-1)
    assert len(set(np.array(drawn["eval"]) - expected)) == 1  # action tokens end the vocabulary


def test_the_protocol_hash_covers_what_decides_an_outcome_and_nothing_else():
    base = protocol_hash(toy_config())
    for same in ("env.num_envs=7", "env.worker_timeout_s=5", "algorithm.lr=1e-5", "seed=9", "env.num_train_starts=20"):
        assert protocol_hash(toy_config(same)) == base, same
    for other in (
        "env.max_steps=20",
        "env.tasks=red-square",
        "eval.num_starts=3",
        "eval.seed=1",
    ):
        assert protocol_hash(toy_config(other)) != base, other
