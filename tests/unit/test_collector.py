"""Rollouts against a replay in a fresh environment, and a resumed collector against one left alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_policy import toy_config, toy_policy

from reachrl.backends.learner import LocalLearner
from reachrl.backends.local import LocalActors
from reachrl.config.ppo import PPOConfig
from reachrl.envs.vector import VectorEnv
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.registry import build
from reachrl.rollout.collector import Collector
from reachrl.rollout.join import join_rollouts
from reachrl.types import Draw, Observation, Start

STEPS = 25


def assigner(tasks):
    """Start states by episode number."""

    def assign(i):
        return Draw(Start(tasks[i % len(tasks)], "train", i % 50), 1 / (i + 2))

    return assign


@pytest.fixture(scope="module")
def setting():
    config = toy_config()
    with VectorEnv(config.env, 2) as envs:
        yield config, toy_policy(config), envs


def test_rollouts_replay_in_a_fresh_environment(setting):
    config, policy, envs = setting
    collector = Collector(policy, envs, seed=3, temperature=1.0)
    rollouts = [collector.collect(assigner(config.env.tasks), STEPS, policy_version=v) for v in range(2)]
    env = build("envs", config.env)
    episodes = [episode for rollout in rollouts for episode in rollout.episodes]
    images = np.concatenate([rollout.frames for rollout in rollouts])
    ids = np.concatenate([rollout.token_ids for rollout in rollouts])
    ends = np.concatenate([rollout.terminated | rollout.truncated for rollout in rollouts])
    finals = {}
    for number, rollout in enumerate(rollouts):
        for image, (t, n) in zip(rollout.final_frames, rollout.final_rows, strict=True):
            finals[int(t) + number * STEPS, int(n)] = image
    checked = 0
    for n in range(2):
        # Environment n of 2 plays the episodes numbered n, n + 2, ...: each knows the chance of its own draw.
        chances = [episode.chance for episode in episodes if episode.env == n]
        assert chances == [1 / (n + 2 * place + 2) for place in range(len(chances))]
        begin = 0
        for end in np.flatnonzero(ends[:, n]):
            episode = [e for e in episodes if e.env == n][sum(ends[:end, n])]
            observation, _ = env.reset(options={"start": episode.start})
            for t in range(begin, end + 1):
                np.testing.assert_array_equal(images[t, n], observation["images"]["camera"])
                action = policy.decode_actions(torch.from_numpy(ids[t, n][None]))[0, 0]
                observation, reward, terminated, truncated, _ = env.step(action)
                assert (terminated or truncated) == bool(ends[t, n])
            np.testing.assert_array_equal(finals[end, n], observation["images"]["camera"])
            assert episode.num_steps == end - begin + 1
            assert episode.success == terminated == bool(reward)
            begin, checked = end + 1, checked + 1
    assert checked >= 4 and any(begin for begin in finals)


def test_behaviour_logprobs_and_old_logprobs_are_those_of_the_policy(setting):
    config, policy, envs = setting
    rollout = Collector(policy, envs, seed=4, temperature=1.3).collect(
        assigner(config.env.tasks), STEPS, policy_version=0
    )
    learner = LocalLearner(policy, PPOConfig(), seed=0, temperature=1.3)
    scored = learner.score(rollout).result()
    np.testing.assert_allclose(scored.old_logprobs, rollout.behaviour_logprobs, atol=1e-5)
    # An independent pass: one row at a time, full distribution.
    for t, n in [(0, 0), (7, 1), (24, 0)]:
        one = policy.encode(
            Observation(images={"camera": rollout.frames[t, n][None]}, instructions=(rollout.instructions[t][n],))
        )
        out = policy.evaluate(one, torch.from_numpy(rollout.token_ids[t, n][None]), temperature=1.3)
        np.testing.assert_allclose(scored.old_logprobs[t, n], out.logprobs[0].detach().numpy(), atol=1e-5)
        assert scored.values[t, n] == pytest.approx(out.values.item(), abs=1e-5)
    for image, (t, n) in zip(rollout.final_frames, rollout.final_rows, strict=True):
        one = policy.encode(Observation(images={"camera": image[None]}, instructions=(rollout.instructions[t][n],)))
        assert scored.final_values[t, n] == pytest.approx(policy.values(one).item(), abs=1e-5)
    last = policy.values(policy.encode(rollout.last_observation)).detach().numpy()
    np.testing.assert_allclose(scored.values[-1], last, atol=1e-5)


def test_a_restored_collector_continues_as_if_nothing_had_happened(setting):
    config, policy, envs = setting
    whole, tail = Collector(policy, envs, seed=5, temperature=1.0), assigner(config.env.tasks)
    whole.collect(tail, STEPS, policy_version=0)
    state = json.loads(json.dumps(whole.state()))
    expected = whole.collect(tail, STEPS, policy_version=1)
    resumed = Collector(policy, envs, seed=5, temperature=1.0)
    resumed.load_state(state)
    found = resumed.collect(assigner(config.env.tasks), STEPS, policy_version=1)
    for name in ("frames", "token_ids", "behaviour_logprobs", "success", "truncated", "final_frames", "final_rows"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.episodes == expected.episodes


def same_rollout(found, expected):
    for name in ("frames", "token_ids", "success", "truncated", "valid", "final_frames", "final_rows", "progress"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(found.last_observation.frames, expected.last_observation.frames)
    assert (found.instructions, found.episodes) == (expected.instructions, expected.episodes)
    # Rows are decoded in other batches.
    np.testing.assert_allclose(found.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-5)


def test_who_collects_and_in_which_groups_changes_no_episode():
    config = toy_config("env.radius=0.2", "env.max_steps=9")  # some succeed early: episodes of several lengths
    policy, assign = toy_policy(config), assigner(config.env.tasks)

    def actors(shares, first=0):
        """One actor with groups of these sizes."""
        groups = [VectorEnv(config.env, count) for count in shares]
        return LocalActors(policy, groups, seed=5, temperature=1.0, first=first, total=5)

    alone, grouped = actors([5]), actors([2, 1, 2])
    pair = [actors([3]), actors([1, 1], first=3)]
    expected = [alone.collect(assign, STEPS).result() for _ in range(2)]
    assert len({episode.num_steps for episode in expected[1].episodes}) >= 2
    assert {episode.env for episode in expected[1].episodes} == set(range(5))
    for one in expected:
        same_rollout(grouped.collect(assign, STEPS).result(), one)
    same_rollout(join_rollouts([one.collect(assign, STEPS).result() for one in pair]), expected[0])
    # The environments are shared out anew, with the episodes that run in them.
    rows = [row for one in pair for row in one.state_dict()["rows"]]
    moved = [actors([1]), actors([2, 2], first=1)]
    moved[0].load_state_dict({"lost_episodes": 0, "rows": rows[:1]})
    moved[1].load_state_dict({"lost_episodes": 0, "rows": rows[1:]})
    same_rollout(join_rollouts([one.collect(assign, STEPS).result() for one in moved]), expected[1])
    for one in (alone, grouped, *pair, *moved):
        one.close()


def test_lost_episodes_are_counted_over_the_whole_run(setting):
    _, policy, envs = setting
    actors = LocalActors(policy, [envs], seed=5, temperature=1.0)
    envs.lost_episodes = 2
    resumed = LocalActors(policy, [envs], seed=5, temperature=1.0)
    resumed.load_state_dict(json.loads(json.dumps(actors.state_dict())))
    envs.lost_episodes = 3  # as the resumed process counts them itself
    assert (actors.lost_episodes, resumed.lost_episodes) == (3, 5)
    envs.lost_episodes = 0


def test_frozen_vision_cached_once_gives_the_gradients_of_the_uncached_path(setting):
    config, policy, envs = setting
    rollout = Collector(policy, envs, seed=6, temperature=1.0).collect(assigner(config.env.tasks), 5, policy_version=0)
    rows = torch.arange(10)
    grads = []
    for train_vision in (False, True):
        learner = LocalLearner(policy, PPOConfig(train_vision=train_vision), seed=0, temperature=1.0)
        scored = learner.score(rollout).result()
        inputs = learner._scorer.inputs(rollout, rows)(rows)
        assert (inputs.vision_features is None) == train_vision
        policy.zero_grad()
        ids = torch.from_numpy(rollout.token_ids).reshape(10, -1)
        policy.evaluate(inputs, ids).logprobs.sum().backward()
        grads.append([p.grad.clone() for p in policy.parameter_groups()["trunk"] if p.grad is not None])
        assert np.isfinite(scored.values).all()
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_learner_takes_the_features_that_its_own_policy_acted_on(setting, monkeypatch):
    """With them and without, scores and rows are the same; only what follows the rollout is seen anew."""
    config, policy, _ = setting
    groups = [VectorEnv(config.env, count) for count in (1, 2)]
    actors = LocalActors(policy, groups, seed=6, temperature=1.0, keep_inputs=True)
    rollout = actors.collect(assigner(config.env.tasks), 5).result()
    actors.close()
    learner = LocalLearner(policy, PPOConfig(score_batch_size=4), seed=0, temperature=1.0)
    flat = rollout.decisions()
    scores, rows, seen = [], [], []
    original = type(policy).cache
    monkeypatch.setattr(type(policy), "cache", lambda self, inputs: seen.append(len(inputs)) or original(self, inputs))
    for each in (rollout, replace(rollout, inputs=None)):
        seen.append(0)
        scores.append(learner.score(each).result())
        rows.append(learner._scorer.inputs(each, torch.arange(15))(torch.arange(15)))
    follow = 3 + len(rollout.final_rows)
    assert (sum(seen[: seen.index(0, 1)]), sum(seen)) == (follow, 2 * follow + 15)
    for name in ("old_logprobs", "values", "final_values"):
        np.testing.assert_allclose(getattr(scores[0], name), getattr(scores[1], name), atol=1e-5, err_msg=name)
    by_hand = policy.vision_features(policy.encode(flat).pixel_values)
    for each in rows:
        torch.testing.assert_close(each.vision_features, by_hand)
        assert policy.encode(flat).prompt_ids.equal(each.prompt_ids)


def test_parts_with_longer_instructions_are_padded_together(setting):
    _, policy, _ = setting
    texts = ("move to the red square", "reach around the wall and press the button on the front of the box please now")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)
    parts = []
    for n in range(2):
        parts.append(
            policy.cache(policy.encode(Observation(images={"camera": images[n][None]}, instructions=texts[n : n + 1])))
        )
    assert parts[0].prompt_ids.shape != parts[1].prompt_ids.shape
    ids, _ = policy.encode_actions(np.zeros((2, 1, 4), np.float32))
    together = policy.evaluate(OpenVLAInputs.concat(parts), ids)
    for n in range(2):
        alone = policy.evaluate(parts[n], ids[n : n + 1])
        torch.testing.assert_close(together.logprobs[n], alone.logprobs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.values[n], alone.values[0], atol=1e-5, rtol=1e-5)
