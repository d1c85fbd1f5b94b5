"""Every algorithm must solve a contextual bandit over several seeds, and none when rewards are shuffled."""

import numpy as np
import pytest
import torch

from reachrl.algorithms.base import Batch
from reachrl.algorithms.grpo import GRPO, RLOO
from reachrl.algorithms.ppo import PPO
from reachrl.config.grpo import GRPOConfig, RLOOConfig
from reachrl.config.ppo import PPOConfig
from reachrl.streams import Stream, generator
from reachrl.testing.policies import TablePolicy, TablePolicyConfig, given_noise
from reachrl.types import Observation

ROWS, ITERATIONS = 256, 25


def succeeds(contexts, token_ids):
    """Context 0 wants both tokens low, context 1 both high: a quarter of random actions."""
    wanted_high = torch.from_numpy(contexts == 1)[:, None]
    return ((token_ids >= 128) == wanted_high).all(1)


def ppo(policy, seed, **options):
    config = PPOConfig(**options, value_lr=0.05, warmup_iterations=0)
    return PPO(config, policy, seed=seed, temperature=1.0)


def grpo(policy, seed, **options):
    return GRPO(GRPOConfig(**options), policy, seed=seed, temperature=1.0)


def rloo(policy, seed, **options):
    return RLOO(RLOOConfig(**options), policy, seed=seed, temperature=1.0)


def credit(algorithm, rewards, sample):
    """Episodes of one decision, in groups of eight of the same context."""
    if isinstance(algorithm, PPO):
        return {"advantages": rewards - sample.values, "returns": rewards, "old_values": sample.values}
    advantages = algorithm.advantages(rewards.double().numpy(), np.arange(ROWS) // 8)
    return {"advantages": torch.from_numpy(advantages)}


def final_success(seed, *, shuffled, level="action", make=ppo):
    torch.manual_seed(seed)
    policy = TablePolicy(TablePolicyConfig())
    algorithm = make(policy, seed, lr=0.05, epochs=2, minibatch_size=64, ratio_level=level)
    rng = np.random.default_rng(seed)
    rate = 0.0
    for iteration in range(ITERATIONS):
        contexts = rng.integers(0, 2, ROWS) if make is ppo else rng.integers(0, 2, ROWS // 8).repeat(8)
        images = contexts.astype(np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
        inputs = policy.encode(Observation(images={"camera": images}, instructions=("",) * ROWS))
        gumbel = torch.from_numpy(
            generator(seed, Stream.ROLLOUT_NOISE, iteration, 0).gumbel(size=(ROWS, 2, 256)).astype(np.float32)
        )
        sample = policy.act(inputs, noise=given_noise(gumbel))
        success = succeeds(contexts, sample.token_ids)
        rate = success.float().mean().item()
        rewards = success.float()
        if shuffled:
            rewards = rewards[torch.from_numpy(rng.permutation(ROWS))]
        batch = Batch(
            inputs=inputs.rows,
            rows=torch.arange(ROWS),
            token_ids=sample.token_ids,
            token_mask=sample.token_mask,
            malformed=sample.malformed,
            behaviour_logprobs=sample.logprobs,
            old_logprobs=sample.logprobs,
            **credit(algorithm, rewards, sample),
        )
        algorithm.update(batch, iteration=iteration)
    return rate


@pytest.mark.learning
@pytest.mark.parametrize("level", ["action", "token"])
@pytest.mark.parametrize("make", [ppo, grpo, rloo])
def test_the_bandit_is_solved_on_every_seed(level, make):
    assert min(final_success(seed, shuffled=False, level=level, make=make) for seed in range(3)) > 0.8


@pytest.mark.learning
@pytest.mark.parametrize("make", [ppo, grpo])
def test_shuffled_rewards_teach_nothing(make):
    rates = [final_success(seed, shuffled=True, make=make) for seed in range(3)]
    assert max(rates) < 0.45
