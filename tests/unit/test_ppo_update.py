"""PPO's update: exact accumulation, warm-up, KL stop, divergence, against plain autograd."""

import copy

import numpy as np
import pytest
import torch

from reachrl.algorithms.base import PPOBatch
from reachrl.algorithms.ppo import PPO
from reachrl.config.ppo import PPOConfig
from reachrl.errors import DivergedError
from reachrl.functional.ppo import policy_loss, value_loss
from reachrl.testing.policies import TablePolicy, TablePolicyConfig
from reachrl.types import Observation


def make(seed=0, rows=48):
    """A policy with random logits and a batch of its own samples."""
    generator = torch.Generator().manual_seed(seed)
    policy = TablePolicy(TablePolicyConfig())
    with torch.no_grad():
        policy.logits.copy_(torch.randn(policy.logits.shape, generator=generator))
    contexts = torch.randint(0, 2, (rows,), generator=generator)
    images = contexts.numpy().astype(np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
    inputs = policy.encode(Observation(images=images, instructions=("",) * rows))
    gumbel = -torch.empty(rows, 2, 256).exponential_(generator=generator).log()
    sample = policy.act(inputs, gumbel=gumbel)
    batch = PPOBatch(
        inputs=inputs.rows,
        action_ids=sample.action_ids,
        behaviour_logprobs=sample.logprobs,
        old_logprobs=sample.logprobs,
        old_values=sample.values,
        advantages=torch.randn(rows, generator=generator),
        returns=torch.randn(rows, generator=generator),
    )
    return policy, batch


def weights(policy):
    return {name: tensor.detach().clone() for name, tensor in policy.named_parameters()}


@pytest.mark.parametrize("micro", [48, 16, 7, 1])
def test_the_micro_batch_does_not_change_the_update(micro):
    policy, batch = make()
    other = copy.deepcopy(policy)
    config = PPOConfig(epochs=3, minibatch_size=24, micro_batch_size=48, lr=1e-2, warmup_iterations=0)
    PPO(config, policy, seed=1).update(batch, iteration=0, train_policy=True)
    PPO(config.model_copy(update={"micro_batch_size": micro}), other, seed=1).update(
        batch, iteration=0, train_policy=True
    )
    for name, tensor in weights(policy).items():
        torch.testing.assert_close(weights(other)[name], tensor, atol=2e-6, rtol=1e-5)


def test_one_minibatch_equals_plain_autograd_and_adamw():
    policy, batch = make()
    reference = copy.deepcopy(policy)
    config = PPOConfig(
        epochs=1, minibatch_size=48, micro_batch_size=48, lr=1e-2, value_lr=1e-3, entropy_coef=0.01, max_grad_norm=1e9
    )
    PPO(config, policy, seed=3).update(batch, iteration=0, train_policy=True)

    out = reference.evaluate(batch.inputs(torch.arange(48)), batch.action_ids)
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    surrogate, _ = policy_loss(
        out.logprobs, batch.old_logprobs, advantages, clip_eps_low=0.2, clip_eps_high=0.28, ratio_level="action"
    )
    error = value_loss(out.values, batch.old_values, batch.returns, kind="huber").mean()
    (surrogate.mean() - 0.01 * out.entropy.mean() + 0.5 * error).backward()
    groups = [{"params": [reference.logits], "lr": 1e-2}, {"params": [reference.value], "lr": 1e-3}]
    torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0).step()
    torch.testing.assert_close(policy.logits, reference.logits)
    torch.testing.assert_close(policy.value, reference.value)


def test_warm_up_moves_the_critic_alone():
    policy, batch = make()
    before = weights(policy)
    stats = PPO(PPOConfig(minibatch_size=16), policy, seed=0).update(batch, iteration=0, train_policy=False)
    after = weights(policy)
    assert torch.equal(before["logits"], after["logits"]) and torch.equal(before["features"], after["features"])
    assert not torch.equal(before["value"], after["value"])
    assert stats.policy_steps == 0 and stats.value_steps == 6
    unseen = (stats.policy_loss, stats.entropy, stats.approx_kl, stats.clip_frac, stats.grad_norm)
    assert np.isnan(unseen).all() and np.isfinite([stats.value_loss, stats.value_grad_norm, stats.engine_kl]).all()


def test_zero_advantage_leaves_the_policy_still():
    policy, batch = make()
    before = weights(policy)
    still = PPOBatch(**{f: getattr(batch, f) for f in batch.__slots__} | {"advantages": torch.zeros(48)})
    PPO(PPOConfig(minibatch_size=16), policy, seed=0).update(still, iteration=0, train_policy=True)
    assert torch.equal(before["logits"], weights(policy)["logits"])


def test_the_kl_stop_ends_policy_steps_but_not_the_critic():
    policy, batch = make()
    config = PPOConfig(epochs=10, minibatch_size=48, lr=0.3, target_kl=0.02)
    stats = PPO(config, policy, seed=0).update(batch, iteration=0, train_policy=True)
    assert 1 <= stats.policy_steps < 10
    assert stats.approx_kl > 0.02  # what triggered the stop is what is reported
    free = PPO(config.model_copy(update={"target_kl": None}), make()[0], seed=0)
    assert free.update(batch, iteration=0, train_policy=True).policy_steps == 10


def test_stale_old_logprobs_are_our_mistake_and_found():
    policy, batch = make()
    stale = PPOBatch(**{f: getattr(batch, f) for f in batch.__slots__} | {"old_logprobs": batch.old_logprobs - 0.1})
    with pytest.raises(AssertionError, match="ratio"):
        PPO(PPOConfig(), policy, seed=0).update(stale, iteration=0, train_policy=True)


@pytest.mark.parametrize("field", ["returns", "advantages"])
def test_a_loss_that_is_not_finite_stops_before_the_step(field):
    policy, batch = make()
    before = weights(policy)
    broken = PPOBatch(**{f: getattr(batch, f) for f in batch.__slots__} | {field: torch.full((48,), float("nan"))})
    with pytest.raises(DivergedError, match="not finite"):
        PPO(PPOConfig(), policy, seed=0).update(broken, iteration=0, train_policy=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())


def test_engine_gap_is_measured_between_sampler_and_learner():
    policy, batch = make()
    shifted = PPOBatch(
        **{f: getattr(batch, f) for f in batch.__slots__} | {"behaviour_logprobs": batch.old_logprobs - 0.1}
    )
    stats = PPO(PPOConfig(), policy, seed=0).update(shifted, iteration=0, train_policy=True)
    assert stats.engine_kl == pytest.approx(np.exp(0.2) - 1 - 0.2, rel=1e-4)


def test_learning_rate_ramps_after_warm_up():
    policy, batch = make()
    algorithm = PPO(PPOConfig(lr=1.0, lr_warmup_iterations=3, warmup_iterations=2), policy, seed=0)
    rates = [algorithm.update(batch, iteration=i, train_policy=False).lr for i in range(7)]
    assert rates == pytest.approx([0.25, 0.25, 0.25, 0.5, 0.75, 1.0, 1.0])
