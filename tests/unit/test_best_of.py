"""The best of N sampled actions: which candidate is taken, nested candidates, the look-ahead, and the command."""

import json

import numpy as np
import pytest
import torch
from test_branch import typed
from tiny_run import play, tiny_config
from toy_policy import toy_config, toy_policy

from reachrl.config.evaluation import EvalSection
from reachrl.envs.vector import open_envs
from reachrl.evaluation import evaluate, heldout_starts
from reachrl.functional.action_stats import means_of
from reachrl.policies.base import ActionSample
from reachrl.registry import build
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.rollout import best_of
from reachrl.rollout.best_of import BestOfPlayer, votes_against

OPTIONS = EvalSection(num_starts=2, seed=6)


def outcomes(config, policy, count, rank, look_ahead=None, spy=None, reward_model=None):
    starts = heldout_starts(config.env, OPTIONS)
    with open_envs(config.env, 3) as envs:
        player = BestOfPlayer(
            policy,
            envs,
            temperature=1.0,
            seed=OPTIONS.seed,
            count=count,
            rank=rank,
            look_ahead=look_ahead,
            reward_model=reward_model,
        )
        if spy is not None:
            scores = player._scores
            player._scores = lambda *args: spy(*args, scores(*args))  # pyright: ignore[reportAttributeAccessIssue]
        return player, player.play(starts, record=lambda _: True)


@pytest.mark.parametrize("rank", ["logprob", "vote", "mean", "critic"])
def test_the_best_of_one_is_the_ordinary_evaluation(rank):
    config = toy_config("env.max_steps=5")
    policy, starts = toy_policy(config), heldout_starts(config.env, OPTIONS)
    with open_envs(config.env, 2) as envs:
        plain = evaluate(policy, envs, starts, mode="sampled", config=OPTIONS, record=lambda _: True).episodes
    player, found = outcomes(config, policy, 1, rank)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_array_equal([t.actions for t in one.turns], [t.actions for t in other.turns])
    assert player.decisions == sum(episode.num_steps for episode in found) and player.seconds > 0


def test_the_mean_of_the_candidates_is_carried_out():
    config = toy_config("env.max_steps=4")
    policy, seen = toy_policy(config, seed=2), []

    def spy(samples, offered, current, scores):
        seen.append((offered.copy(), [sample.token_ids.numpy() for sample in samples]))
        return scores

    _, found = outcomes(config, policy, 4, "mean", spy=spy)
    first = {episode.start: episode.turns[0] for episode in found}
    offered, tokens = seen[0]
    for n, start in enumerate(heldout_starts(config.env, OPTIONS)[:3]):
        mean = sum(offered[n, c].astype(np.float64) for c in range(4)) / 4
        np.testing.assert_allclose(first[start].actions, mean, rtol=1e-6, atol=1e-7)
        nearest = min(range(4), key=lambda c: np.abs(offered[n, c] - mean).sum())
        np.testing.assert_array_equal(first[start].token_ids, tokens[nearest][n])


def test_malformed_candidates_have_no_part_in_the_mean():
    offered = np.array([[[[1.0]], [[9.0]], [[3.0]]], [[[0.0]], [[0.5]], [[1.0]]]], np.float32)
    known = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(means_of(offered, known), np.array([[[2.0]], [[0.5]]], np.float32))


def test_logprob_takes_the_likeliest_of_nested_candidates():
    config = toy_config("env.max_steps=4")
    policy, seen = toy_policy(config, seed=2), []

    def spy(samples, offered, current, scores):
        expected = np.stack([sample.logprobs.sum(-1).numpy() for sample in samples], axis=1)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
        seen.append((offered.copy(), expected, [start is not None for start in current]))
        return scores

    _, four = outcomes(config, policy, 4, "logprob", spy=spy)
    first = {episode.start: episode.turns[0] for episode in four}
    _, alone = outcomes(config, policy, 1, "logprob")
    offered, scores, _ = seen[0]
    starts = heldout_starts(config.env, OPTIONS)[:3]
    for n, start in enumerate(starts):
        np.testing.assert_array_equal(first[start].actions, offered[n, scores[n].argmax()])
        assert first[start].logprob == pytest.approx(scores[n].max(), rel=1e-5)
        # Candidate 0 is what the evaluation with one candidate carries out.
        np.testing.assert_array_equal(next(e for e in alone if e.start == start).turns[0].actions, offered[n, 0])


def test_the_vote_takes_the_medoid():
    offered = np.array([[[0.0, 0.0], [0.1, 0.0], [1.0, 1.0], [0.0, 0.2]], [[1, 1], [0, 0], [1, 1], [1, 0]]], np.float32)
    offered = offered[:, :, None]  # chunks of one action
    # By hand, L1: 0 -> .1 + 2 + .2; 1 -> .1 + 1.9 + .3; 2 -> 2 + 1.9 + 1.8; 3 -> .2 + .3 + 1.8, over three others.
    np.testing.assert_allclose(votes_against(offered)[0], np.array([2.3, 2.3, 5.7, 2.3]) / 3, rtol=1e-6)
    np.testing.assert_allclose(votes_against(offered)[1], np.array([3, 5, 3, 3]) / 3)


def test_the_critic_looks_at_the_state_that_each_candidate_leads_to():
    config = toy_config("env.max_steps=6", "env.radius=0.2")
    policy, tried = toy_policy(config, seed=3), []
    env = build("envs", config.env)

    def spy(samples, offered, current, scores):
        tried.append((offered.copy(), list(current), scores.copy()))
        return scores

    with open_envs(config.env, 3) as look_ahead:
        _, found = outcomes(config, policy, 3, "critic", look_ahead, spy)
    for episode in found[:3]:
        taken = [turn.actions for turn in episode.turns]
        n = heldout_starts(config.env, OPTIONS).index(episode.start)
        for step in range(min(3, len(taken))):
            offered, current, scores = tried[step]
            assert current[n] == episode.start
            for candidate, score in zip(offered[n], scores[n], strict=True):
                observation, _ = env.reset(options={"start": episode.start})
                for chunk in taken[:step]:
                    env.step(chunk[0])
                observation, _, terminated, truncated, _ = env.step(candidate[0])
                if terminated:
                    assert score == 1.0
                elif not truncated:
                    assert score == pytest.approx(value(policy, env, episode.start, observation), rel=1e-4, abs=1e-6)
            np.testing.assert_array_equal(taken[step], offered[n, scores[n].argmax()])


def value(policy, env, start, observation):
    from reachrl.types import Observation

    images = {camera: frame[None] for camera, frame in observation["images"].items()}
    with torch.no_grad():
        seen = Observation(images=images, instructions=(env.instruction(start.task),))
        return float(policy.values(policy.encode(seen))[0])


def small_model(instructions):
    torch.manual_seed(0)
    return SmallRewardModel(image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=instructions).eval()


def test_the_reward_model_scores_the_frame_that_each_candidate_leads_to():
    config = toy_config("env.max_steps=4", "env.radius=0.2")
    policy, tried = toy_policy(config, seed=3), []
    env = build("envs", config.env)
    instructions = {start.task: env.instruction(start.task) for start in heldout_starts(config.env, OPTIONS)}

    model = small_model(list(instructions.values()))

    def spy(samples, offered, current, scores):
        tried.append((offered.copy(), list(current), scores.copy()))
        return scores

    with open_envs(config.env, 3) as look_ahead:
        _, found = outcomes(config, policy, 3, "reward", look_ahead, spy, model)
    offered, current, scores = tried[0]
    for n, start in enumerate(current):
        for candidate, score in zip(offered[n], scores[n], strict=True):
            env.reset(options={"start": start})
            observation, _, terminated, _, _ = env.step(candidate[0])
            frame = next(iter(observation["images"].values()))
            alone = model.score(frame[None], [instructions[start.task]], batch_size=3)[0]
            assert score == (1.0 if terminated else pytest.approx(alone, rel=1e-6))
        episode = next(each for each in found if each.start == start)
        np.testing.assert_array_equal(episode.turns[0].actions, offered[n, scores[n].argmax()])


def test_a_malformed_candidate_is_the_last_resort(monkeypatch):
    config = toy_config("env.max_steps=2")
    policy, calls = toy_policy(config), []
    real = best_of.answer

    def answer(*args, **options):
        sample, actions = real(*args, **options)
        calls.append(actions)
        bad = len(calls) % 2 == 1  # the first of two candidates
        values = {name: getattr(sample, name) for name in ("token_ids", "token_mask", "logprobs", "values")}
        return ActionSample(**values, malformed=torch.full((len(actions),), bad)), actions

    monkeypatch.setattr(best_of, "answer", answer)
    _, found = outcomes(config, policy, 2, "vote")
    np.testing.assert_array_equal(found[0].turns[0].actions[0], calls[1][0, 0])


def test_the_command_measures_every_number_on_the_same_starts(tmp_path):
    run = tmp_path / "run"
    config = tiny_config("eval.num_starts=2")
    play(config, run, "demos", "sft", "reward", "train")
    said = typed("eval", "--run", run, "--best-of", "1,3", "--rank", "critic", "--out", tmp_path / "out")
    assert "oracle look-ahead" in said.lower()
    result = json.loads((tmp_path / "out" / "best-of-critic.json").read_text())
    assert [row["best_of"] for row in result["rows"]] == [1, 3] and result["mode"] == "sampled"
    one, three = (
        {(e["task"], e["start"]): e["success"] for e in row["outcomes"]["episodes"]} for row in result["rows"]
    )
    assert one.keys() == three.keys() and len(one) == 6
    test = result["rows"][1]["against_one"]
    assert test["improved"] == sum(three[key] and not one[key] for key in one)
    assert all(row["ms_per_decision"] > 0 for row in result["rows"])
    with pytest.raises(Exception, match="there is none in"):
        typed("eval", "--run", run, "--best-of", "2", "--rank", "reward")
    env = build("envs", config.env)
    small_model([env.instruction(task) for task in config.env.tasks]).save_pretrained(run / "reward_model" / "model")
    typed("eval", "--run", run, "--best-of", "2", "--rank", "reward", "--out", tmp_path / "reward")
    judged = json.loads((tmp_path / "reward" / "best-of-reward.json").read_text())
    assert judged["oracle_look_ahead"] and [row["best_of"] for row in judged["rows"]] == [1, 2]
    for wrong, words in (
        (("--best-of", "0"), "expected numbers from 1 to 64"),
        (("--best-of", "2", "--rank", "luck"), "expected logprob, vote, mean, critic or reward"),
        (("--best-of", "2", "eval.temperatures=0"), "needs one above 0"),
    ):
        with pytest.raises(Exception, match=words):
            typed("eval", "--run", run, *wrong)
