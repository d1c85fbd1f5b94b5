"""PPO's losses against a scalar re-derivation, row by row, and against gradients worked by hand."""

import math

import numpy as np
import pytest
import torch

from reachrl.functional.ppo import importance_weights, policy_loss, token_kl, value_loss

ALL = torch.ones(32, 4, dtype=torch.bool)


def by_hand(new, old, advantage, low, high, level):
    """The clipped surrogate of one row with plain floats."""
    terms = []
    logs = [sum(new) - sum(old)] if level == "action" else [a - b for a, b in zip(new, old, strict=True)]
    for log_ratio in logs:
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 1 - low), 1 + high)
        terms.append(-min(ratio * advantage, clipped * advantage))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("level", ["action", "token"])
def test_policy_loss_equals_the_scalar_formula(level):
    rng = np.random.default_rng(0)
    new, old = rng.normal(-3, 0.2, (32, 4)), rng.normal(-3, 0.2, (32, 4))
    advantages = rng.normal(size=32)
    loss, stats = policy_loss(
        torch.tensor(new), torch.tensor(old), torch.tensor(advantages), ALL,
        clip_eps_low=0.2, clip_eps_high=0.3, ratio_level=level,
    )  # fmt: skip
    expected = [by_hand(n, o, a, 0.2, 0.3, level) for n, o, a in zip(new, old, advantages, strict=True)]
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6)
    gaps = new - old
    kl = token_kl(torch.tensor(new), torch.tensor(old), ALL)
    np.testing.assert_allclose(kl.numpy(), np.mean(np.exp(gaps) - 1 - gaps, axis=1), rtol=1e-6)
    logs = gaps.sum(1, keepdims=True) if level == "action" else gaps
    assert stats["log_ratio_max"].item() == pytest.approx(np.abs(logs).max(), rel=1e-6)


@pytest.mark.parametrize("level", ["action", "token"])
def test_the_clipped_share_is_that_of_ratios_without_a_gradient(level):
    rng = np.random.default_rng(1)
    new = torch.tensor(rng.normal(-3, 0.2, (64, 4)), requires_grad=True)
    loss, stats = policy_loss(
        new, torch.tensor(rng.normal(-3, 0.2, (64, 4))), torch.tensor(rng.normal(size=64)),
        torch.ones(64, 4, dtype=torch.bool),
        clip_eps_low=0.2, clip_eps_high=0.3, ratio_level=level,
    )  # fmt: skip
    loss.sum().backward()
    assert new.grad is not None
    cut = (new.grad == 0).double().mean().item()
    assert 0.1 < cut < 0.5
    assert stats["clip_frac"].item() == pytest.approx(cut)


def test_the_kl_of_a_token_is_that_of_the_distributions():
    """Over samples enough, the estimator is the closed form; and an action's is the sum over its tokens."""
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(3, 16, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (old.exp() * (old - new)).sum(-1)  # of each of three tokens
    ids = torch.stack([torch.multinomial(row.exp(), 200_000, replacement=True, generator=generator) for row in old], 1)
    rows = torch.arange(3)
    estimate = token_kl(new[rows, ids], old[rows, ids], torch.ones_like(ids, dtype=torch.bool))
    assert estimate.mean().item() == pytest.approx(exact.mean().item(), rel=0.01)
    assert 3 * estimate.mean().item() == pytest.approx(exact.sum().item(), rel=0.01)


@pytest.mark.parametrize(
    ("shift", "advantage", "moves"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.0, 1.0, True)],
)
def test_the_clip_stops_gradients_only_where_the_change_is_already_too_good(shift, advantage, moves):
    logprobs = torch.tensor([[shift, 0.0]], requires_grad=True)
    loss, _ = policy_loss(
        logprobs,
        torch.zeros(1, 2),
        torch.tensor([advantage]),
        torch.ones(1, 2, dtype=torch.bool),
        clip_eps_low=0.2,
        clip_eps_high=0.2,
        ratio_level="action",
    )
    loss.sum().backward()
    assert logprobs.grad is not None
    assert bool(logprobs.grad.abs().sum() > 0) is moves
    if moves:  # d(-A r)/d logp = -A r
        np.testing.assert_allclose(logprobs.grad.numpy(), -advantage * math.exp(shift), rtol=1e-6)


def test_value_loss_takes_the_larger_of_clipped_and_unclipped():
    values, old, returns = torch.tensor([2.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    plain = value_loss(values, old, returns, kind="mse")
    np.testing.assert_allclose(plain.numpy(), [0.5, 0.405], rtol=1e-6)
    clipped = value_loss(values, old, returns, kind="mse", clip=0.2)
    np.testing.assert_allclose(clipped.numpy(), [0.5, 0.405], rtol=1e-6)  # |0.2 - 1|^2 / 2 = 0.32 < 0.5
    toward = value_loss(torch.tensor([0.9]), torch.tensor([0.0]), torch.tensor([1.0]), kind="mse", clip=0.2)
    assert toward.item() == pytest.approx(0.5 * 0.8**2)  # the clipped error is the larger
    huber = value_loss(torch.tensor([4.0]), old[:1], returns[:1], kind="huber")
    assert huber.item() == pytest.approx(3.0 - 0.5)


def test_importance_weights_are_truncated():
    old, behaviour = (
        torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.9]])),
        torch.log(torch.tensor([[0.5, 0.25], [0.1, 0.9]])),
    )
    np.testing.assert_allclose(
        importance_weights(old, behaviour, torch.ones(2, 2, dtype=torch.bool), cap=3.0).numpy(), [2.0, 3.0], rtol=1e-6
    )
