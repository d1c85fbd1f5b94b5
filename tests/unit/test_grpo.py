"""GRPO and leave-one-out in the house: groups of whole episodes, batches, no critic, exact resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import OVERRIDES, play, train_lines
from toy_policy import toy_config, toy_policy

from reachrl.algorithms.grpo import GRPO, RLOO
from reachrl.backends.learner import LocalLearner
from reachrl.backends.local import LocalActors
from reachrl.config.grpo import GRPOConfig, RLOOConfig
from reachrl.config.loading import load_config
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError
from reachrl.registry import build
from reachrl.rewards.task import TaskReward
from reachrl.rollout.join import append_rewards, append_rollouts
from reachrl.types import Rewards, Scored, Start

KIND = ("algorithm.kind=grpo", "algorithm.group_size=4")


@pytest.fixture(scope="module")
def setting():
    config = toy_config(*KIND, "env.num_envs=4", "env.max_steps=5", "rollout.num_steps=12", "env.radius=0.2")
    with VectorEnv(config.env, 4) as four, VectorEnv(config.env, 1) as one, VectorEnv(config.env, 3) as three:
        yield config, toy_policy(config), (four, one, three)


def actors_of(setting, groups, **changes):
    config, policy, _ = setting
    options = {"needs": config.algorithm.needs, "max_steps": config.env.max_steps} | changes
    actors = LocalActors(policy, groups, seed=1, temperature=1.0, **options)
    actors.load_weights(LocalLearner(policy, config.algorithm, seed=1, temperature=1.0).export_weights())
    return actors


def grouped(*options):
    """The tiny run, without what only PPO knows."""
    return load_config("toy", [*(option for option in OVERRIDES if "warmup" not in option), *options])


def assign(number):
    return Start(("red-square", "green-square", "blue-square")[number % 3], "train", number)


def by_number(rollout):
    """Start, group, tokens and frames of every episode."""
    found = {}
    for (t, n), episode in zip(rollout.final_rows.tolist(), rollout.episodes, strict=True):
        rows = slice(t + 1 - episode.num_steps, t + 1)
        place = sum(1 for (s, m) in rollout.final_rows.tolist() if m == n and s < t)
        ids, images = rollout.token_ids[rows, n].tolist(), rollout.frames[rows, n].tobytes()
        found[place * rollout.valid.shape[1] + n] = (episode.start, episode.group, ids, images)
    return found


def test_groups_begin_alike_act_otherwise_and_end_whoever_plays_them(setting):
    four, one, three = setting[2]
    actors = actors_of(setting, [four])
    together = [actors.collect(assign, 12).result() for _ in range(2)]
    for number, rollout in enumerate(together):
        episodes = by_number(rollout)
        assert len(episodes) == 8  # two of at most five decisions fit into twelve, in each of four environments
        assert [episodes[i][1] for i in range(8)] == [2 * number] * 4 + [2 * number + 1] * 4
        assert {episodes[i][0] for i in range(4)} == {assign(2 * number)}
        assert len({str(episodes[i][2]) for i in range(8)}) == 8  # noise differs
        assert rollout.valid.sum() == sum(episode.num_steps for episode in rollout.episodes)
    split = actors_of(setting, [one, three])
    for rollout in together:  # environments in several groups, or elsewhere
        again = split.collect(assign, 12).result()
        assert by_number(again) == by_number(rollout)


def test_what_was_played_is_all_that_a_resumed_collector_needs(setting):
    four = setting[2][0]
    actors = actors_of(setting, [four])
    actors.collect(assign, 12).result()
    state = json.loads(json.dumps(actors.state_dict()))
    expected = by_number(actors.collect(assign, 12).result())
    resumed = actors_of(setting, [four])
    resumed.load_state_dict(state)
    assert by_number(resumed.collect(assign, 12).result()) == expected


@pytest.mark.parametrize(("kind", "section"), [(GRPO, GRPOConfig), (RLOO, RLOOConfig)])
@pytest.mark.parametrize("length_weight", ["decision", "episode"])
def test_every_decision_gets_the_advantage_of_its_episode(setting, kind, section, length_weight):
    policy, (four, *_) = setting[1:]
    rollout = actors_of(setting, [four]).collect(assign, 12).result()
    earned = np.random.default_rng(0).normal(size=rollout.valid.shape).astype(np.float32) * rollout.valid
    third = next(i for i, episode in enumerate(rollout.episodes) if episode.group == 1)
    for (t, n), episode in zip(rollout.final_rows.tolist(), rollout.episodes, strict=True):
        if episode.group == 1:  # all of this group earn 1
            earned[t + 1 - episode.num_steps : t + 1, n] = 0
            earned[t, n] = 1
    options = section(group_size=4, length_weight=length_weight)
    scored = Scored(old_logprobs=rollout.behaviour_logprobs, values=None, final_values=None)
    rewards = Rewards(total=earned)
    batch = kind(options, policy, seed=0, temperature=1.0).batch(rollout, rewards, scored)
    assert (batch.stats["groups"], batch.stats["filtered_groups"]) == (2, 1)
    assert rollout.episodes[third].group == 1
    spans = [
        (
            earned[t + 1 - e.num_steps : t + 1, n].astype(float).sum(),
            e.num_steps,
            [s * 4 + n for s in range(t + 1 - e.num_steps, t + 1)],
        )
        for (t, n), e in zip(rollout.final_rows.tolist(), rollout.episodes, strict=True)
        if e.group == 0
    ]
    worth = np.array([value for value, _, _ in spans])
    wanted, weights = {}, {}
    for value, length, rows in spans:
        others = (worth.sum() - value) / 3
        advantage = (value - worth.mean()) / (worth.std(ddof=1) + 1e-6) if kind is GRPO else value - others
        total = sum(length for _, length, _ in spans)
        wanted |= dict.fromkeys(rows, advantage)
        weights |= dict.fromkeys(rows, total / 4 / length)
    assert batch.rows.tolist() == sorted(wanted)
    np.testing.assert_allclose(batch.advantages, [wanted[row] for row in batch.rows.tolist()], rtol=1e-5, atol=1e-6)
    if length_weight == "episode":
        np.testing.assert_allclose(batch.weights, [weights[row] for row in batch.rows.tolist()], rtol=1e-6)
    else:
        assert batch.weights is None
    assert kind.wants_more(options, rollout, rewards, rollouts=1)
    twice = append_rollouts(
        rollout, replace(rollout, episodes=tuple(replace(e, group=(e.group or 0) + 2) for e in rollout.episodes))
    )
    assert not kind.wants_more(options, twice, append_rewards(rewards, rewards), rollouts=2)


def test_no_critic_is_computed_trained_or_moved(setting, monkeypatch):
    config, policy, (four, *_) = setting
    rollout = actors_of(setting, [four]).collect(assign, 12).result()
    learner = LocalLearner(policy, config.algorithm, seed=1, temperature=1.0)
    monkeypatch.setattr(type(policy), "_value", lambda *_: pytest.fail("a value was computed"))
    scored = learner.score(rollout).result()
    assert scored.values is None
    np.testing.assert_allclose(
        scored.old_logprobs[rollout.valid], rollout.behaviour_logprobs[rollout.valid], rtol=1e-4, atol=1e-5
    )
    rewards = TaskReward()(rollout)
    rewards = replace(rewards, total=rewards.total + rollout.ee_state[..., 0] * rollout.valid)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    stats = learner.update(rollout, rewards, scored, iteration=0)
    moved = {name for name, tensor in policy.state_dict().items() if not tensor.equal(before[name])}
    assert moved and not any("value" in name for name in moved)
    assert stats["policy_steps"] > 0 and "loss/value" not in stats and "value_steps" not in stats


def test_equal_returns_leave_the_policy_still(setting):
    config, policy, (four, *_) = setting
    rollout = actors_of(setting, [four]).collect(assign, 12).result()
    learner = LocalLearner(policy, config.algorithm, seed=1, temperature=1.0)
    scored, nothing = learner.score(rollout).result(), Rewards(total=np.zeros_like(rollout.ee_state[..., 0]))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    stats = learner.update(rollout, nothing, scored, iteration=0)
    assert (stats["groups"], stats["filtered_groups"], stats["policy_steps"]) == (2, 2, 0)
    assert all(tensor.equal(before[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_run_that_is_resumed_equals_one_that_was_not(tmp_path, caplog, kind):
    options = (f"algorithm.kind={kind}", "algorithm.group_size=2", "algorithm.minibatch_size=8", "rollout.num_steps=8")
    options += ("env.radius=0.2", "env.max_steps=4", "checkpoint_every=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    play(grouped(*options), whole, "sft", "train")
    play(grouped(*options, "num_iterations=1"), parts, "sft", "train")
    play(grouped(*options), parts, "train")
    assert train_lines(parts) == train_lines(whole)
    first = train_lines(whole)[0]
    assert {"rollouts", "groups", "filtered_groups"} <= first.keys() and "explained_variance" not in first
    assert first["rollouts"] in (1, 2) and first["success_n"] == 4 * first["rollouts"]
    if any(line["filtered_groups"] > line["groups"] / 2 and line["rollouts"] == 2 for line in train_lines(whole)):
        assert "fewer groups to learn from than one rollout has" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["rollout.num_steps=4"],
            r"whole episodes, but those of 15 decisions \(env.max_steps=15\) exceed rollout.num_steps=4",
        ),
        (["algorithm.group_size=3"], "64 whole episodes .* no groups of algorithm.group_size=3"),
        (["policy.critic=separate"], "set policy.critic=shared"),
        (["collect_ahead=true", "algorithm.importance_cap=2"], "set algorithm.max_rollouts=1"),
        (["algorithm.group_size=1"], "algorithm.group_size = 1"),
    ],
)
def test_what_does_not_fit_the_algorithm_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        load_config("toy", [*KIND, *changes])
    load_config("toy", KIND)


def test_advantages_lift_and_lower_probabilities(setting):
    config, policy, (four, *_) = setting
    policy = toy_policy(config)
    rollout = actors_of((config, policy, None), [four]).collect(assign, 12).result()
    learner = LocalLearner(policy, config.algorithm, seed=1, temperature=1.0)
    scored = learner.score(rollout).result()
    good = np.zeros_like(rollout.ee_state[..., 0])
    winners = [place for place, episode in enumerate(rollout.episodes) if episode.group == 0][:2]
    for place in winners:
        good[tuple(rollout.final_rows[place])] = 1
    batch = learner.algorithm.batch(rollout, Rewards(total=good), scored)
    learner.update(rollout, Rewards(total=good), scored, iteration=0)
    again = learner.score(rollout).result().old_logprobs - scored.old_logprobs
    change = torch.from_numpy(again.reshape(-1, again.shape[-1])).sum(-1)[batch.rows]
    assert change[batch.advantages > 0].mean() > 0 > change[batch.advantages < 0].mean()
    assert build("algorithms", config.algorithm, policy, seed=0, temperature=1.0).state_dict() == {"trained": 0}
