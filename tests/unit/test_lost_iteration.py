"""Iterations in which every environment was lost in every step: no data, and the run goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_policy import toy_config, toy_policy

from reachrl.algorithms.ppo import PPO
from reachrl.backends.base import Pending
from reachrl.backends.local import LocalActors, LocalBackend
from reachrl.config.ppo import PPOConfig
from reachrl.loop import train
from reachrl.registry import build
from reachrl.rewards.process.fit import new_reward_model
from reachrl.run.directory import Run
from reachrl.testing.policies import TablePolicy, TablePolicyConfig
from reachrl.testing.rewards import make_rollout

EXPLAINED = [(float("nan"), True), (0.2, True), (0.3, False), (0.9, False)]  # against a target of 0.3


def without_data(rollout):
    """The rollout as workers leave it that were all lost all the time."""
    none = np.zeros_like(rollout.valid)
    ends = {
        "final_observation": rollout.final_observation.rows(slice(0)),
        "final_rows": rollout.final_rows[:0],
        "episodes": (),
    }
    return replace(rollout, valid=none, success=none, terminated=none, truncated=none, **ends)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_run_goes_on_after_an_iteration_without_data(tmp_path, monkeypatch, caplog, lost):
    config = toy_config("num_iterations=4", "rollout.num_steps=6", "algorithm.warmup_iterations=1", "algorithm.lr=1e-6")
    toy_policy(config).save_pretrained(tmp_path / "warm")
    collect, saved = LocalActors.collect, []

    def losing(self, assign, num_steps):
        pending = collect(self, assign, num_steps)
        saved.append({name: tensor.clone() for name, tensor in self.policy.state_dict().items()})
        if len(saved) - 1 == lost:
            return Pending.done(without_data(pending.result()))
        return pending

    monkeypatch.setattr(LocalActors, "collect", losing)
    curriculum = build("curricula", config.curriculum, tasks=config.env.tasks, num_starts=5, seed=1)
    reward = build("rewards", config.reward, gamma=0.9, bootstrap_truncated=True, model=small_model())
    with (
        Run.open(tmp_path / "run", {}, tensorboard=False) as run,
        LocalBackend(config.backend).open(config, tmp_path / "warm") as workers,
    ):
        train(config, workers, reward, curriculum, run)
        records = run.metrics.read("train")
    assert [record["value_steps"] > 0 for record in records] == [number != lost for number in range(4)]
    empty = records[lost]
    figures = ("loss/policy", "loss/value", "kl", "explained_variance", "engine_kl", "value_grad_norm")
    assert [empty[name] for name in figures] == [None] * len(figures)
    assert all(saved[lost + 1][name].equal(tensor) for name, tensor in saved[lost].items())
    assert f"iteration {lost}: nothing to train on" in caplog.text


def small_model():
    return new_reward_model(toy_config().reward_model, ["reach the goal"], seed=0)


def test_a_process_reward_of_no_data_is_zero():
    config = toy_config("reward.normalise=true", "reward.pay=segments").reward
    reward = build("rewards", config, gamma=0.9, bootstrap_truncated=True, model=small_model())
    rewards = reward(without_data(make_rollout()))
    assert not rewards.total.any() and reward.state_dict()["scale"]["count"] == 0


def test_warm_up_until_the_critic_explains_enough_outlasts_an_iteration_without_data():
    config = toy_config("algorithm.warmup_explained_variance=0.3", "algorithm.warmup_iterations=1").algorithm
    for done, variance, expected in [
        *((3, variance, expected) for variance, expected in EXPLAINED),
        (10, float("nan"), False),  # the longest there is
    ]:
        algorithm = PPO(config, TablePolicy(TablePolicyConfig()), seed=0, temperature=1.0)
        assert algorithm.warming_up
        assert algorithm._still_warming_up(done, variance) is expected


def test_warm_up_that_ended_or_not_is_in_the_state():
    policy = TablePolicy(TablePolicyConfig())
    warm, cold = (PPO(PPOConfig(warmup_iterations=n), policy, seed=0, temperature=1.0) for n in (0, 1))
    assert (warm.warming_up, cold.warming_up) == (False, True)
    states = [json.loads(json.dumps(each.state_dict())) for each in (warm, cold)]
    for each, state in zip((cold, warm), states, strict=True):
        each.load_state_dict(state)
    assert (warm.warming_up, cold.warming_up) == (True, False)
