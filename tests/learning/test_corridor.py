"""The whole loop (collector, reward, advantages, PPO or GRPO, curriculum) must learn a corridor on every seed.

With the reward shuffled between episodes, everything else untouched, the gain must vanish.
"""

import numpy as np
import pytest
import torch
from corridor import LENGTH, CorridorConfig

from reachrl.backends.base import Workers
from reachrl.backends.learner import LocalLearner
from reachrl.backends.local import LocalActors
from reachrl.config.algorithm import AlgorithmSection
from reachrl.config.curriculum import SuccessRateConfig
from reachrl.config.grpo import GRPOConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.rollout import RolloutSection
from reachrl.config.train import TrainConfig
from reachrl.curriculum.success_rate import SuccessRateSampler
from reachrl.envs.vector import VectorEnv
from reachrl.loop import train
from reachrl.rewards.task import TaskReward
from reachrl.run.directory import Run
from reachrl.testing.policies import TablePolicy, TablePolicyConfig
from reachrl.testing.rewards import ShuffledReward

PPO_OPTIONS = PPOConfig(
    lr=0.15, value_lr=0.1, gamma=0.95, minibatch_size=64, epochs=2, target_kl=None, warmup_iterations=2
)
# 8 groups of 4 episodes an iteration: at most as many decisions as PPO has.
GRPO_OPTIONS = GRPOConfig(lr=0.3, group_size=4, minibatch_size=64, epochs=2, target_kl=None, max_rollouts=1)


@pytest.fixture(scope="module")
def envs():
    with VectorEnv(CorridorConfig(), 2) as vector:
        yield vector


def success_by_iteration(envs, path, seed, reward, algorithm: AlgorithmSection = PPO_OPTIONS):
    """Success rate of each iteration's episodes."""
    torch.manual_seed(seed)
    policy = TablePolicy(TablePolicyConfig(num_contexts=2 * LENGTH))
    config = TrainConfig(
        seed=seed,
        num_iterations=30,
        rollout=RolloutSection(num_steps=128),
        checkpoint_every=100,
        env=CorridorConfig(),
        policy=policy.config,
        algorithm=algorithm,
    )
    learner = LocalLearner(policy, algorithm, seed=seed, temperature=1.0)
    actors = LocalActors(
        policy, [envs], seed=seed, temperature=1.0, needs=algorithm.needs, max_steps=config.env.max_steps
    )
    curriculum = SuccessRateSampler(SuccessRateConfig(), tasks=config.env.tasks, num_starts=30, seed=seed)
    with Run.open(path, {}, tensorboard=False) as run:
        train(config, Workers(actors=actors, learner=learner), reward, curriculum, run)
        records = run.metrics.read("train")
    return [record["success_k"] / max(record["success_n"], 1) for record in records]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", [PPO_OPTIONS, GRPO_OPTIONS], ids=["ppo", "grpo"])
def test_the_corridor_is_learned(envs, tmp_path, seed, algorithm):
    rates = success_by_iteration(envs, tmp_path, seed, TaskReward(), algorithm)
    assert np.mean(rates[:3]) < 0.45 and np.mean(rates[-3:]) > 0.85, rates


@pytest.mark.parametrize("algorithm", [PPO_OPTIONS, GRPO_OPTIONS], ids=["ppo", "grpo"])
def test_rewards_shuffled_between_episodes_teach_nothing(envs, tmp_path, algorithm):
    gains = []
    for seed in range(2):
        reward = ShuffledReward(TaskReward(), seed=seed)
        rates = success_by_iteration(envs, tmp_path / str(seed), seed, reward, algorithm)
        gains.append(np.mean(rates[-4:]) - np.mean(rates[:4]))
    assert np.mean(gains) < 0.1, gains
