"""Schedules of the learning rate, the critic's own epochs, dual clip, entropy floor, learning-rate groups."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_ppo_update import make, update, weights
from toy_policy import toy_config, toy_policy

from reachrl.algorithms.base import Batch
from reachrl.algorithms.ppo import PPO
from reachrl.backends.group import Group
from reachrl.backends.learner import new_learner
from reachrl.config.loading import load_config
from reachrl.config.ppo import PPOConfig
from reachrl.errors import ConfigError
from reachrl.functional.ppo import policy_loss
from reachrl.functional.schedules import decay, entropy_bonus, kl_adapted
from reachrl.rollout.acting import EpisodeNoise
from reachrl.run.optimizer_state import load_optimizer, save_optimizer
from reachrl.types import Observation


def scored(policy, batch):
    """The same decisions with the log-probs that the policy gives them now, as an iteration begins."""
    with torch.no_grad():
        logprobs = policy.evaluate(batch.inputs(torch.arange(len(batch.rows))), batch.token_ids).logprobs
    return replace(batch, old_logprobs=logprobs)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decays_are_those_of_torch(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedulers = torch.optim.lr_scheduler
    theirs = (
        schedulers.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=7)
        if kind == "linear"
        else schedulers.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.05)
    )
    for step in range(8):
        assert 0.5 * decay(kind, step / 7, 0.1) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        theirs.step()


def test_the_kl_rule_gives_the_rates_of_rsl_rl():
    """Its learning rates from 1e-3 at desired_kl=0.01, by its rule: factors of 1.5, from 1e-5 to 1e-2."""
    expected = {0.03: 1e-3 / 1.5, 0.0201: 1e-3 / 1.5, 0.02: 1e-3, 0.01: 1e-3, 0.005: 1e-3, 0.0049: 1.5e-3, 0.0: 1e-3}
    for kl, lr in expected.items():
        assert 1e-3 * kl_adapted(1.0, kl, 0.01) == pytest.approx(lr, rel=1e-12), kl
    assert kl_adapted(1.0, float("nan"), 0.01) == 1.0
    aims = [PPOConfig(), PPOConfig(target_kl=0.0125), PPOConfig(target_kl=0.0125, desired_kl=0.003)]
    assert [each.kl_to_aim_at for each in aims] == [0.01, 0.00625, 0.003]
    for kl, bound in ((1.0, 1e-5), (1e-4, 1e-2)):
        factor = 1.0
        for _ in range(40):
            factor = kl_adapted(factor, kl, 0.01)
        assert 1e-3 * factor == pytest.approx(bound, rel=1e-12)


def test_the_rate_follows_the_kl_of_each_update_and_resumes(tmp_path):
    policy, batch = make()
    config = PPOConfig(lr=1e-3, lr_schedule="kl", desired_kl=1e-3, minibatch_size=16, warmup_iterations=0)
    algorithm = PPO(config, policy, seed=0, temperature=1.0)
    expected, rates = 1e-3, []
    for iteration in range(6):
        stats = update(algorithm, scored(policy, batch), iteration=iteration)
        assert stats["lr"] == pytest.approx(expected, rel=1e-12)
        rates.append(stats["lr"])
        if stats["kl"] > 2e-3:
            expected /= 1.5
        elif 0 < stats["kl"] < 5e-4:
            expected *= 1.5
        if iteration == 3:
            save_optimizer(algorithm.optimizer, tmp_path / "optimizer.safetensors")
            saved, state = copy.deepcopy(policy), json.loads(json.dumps(algorithm.state_dict()))
    assert len(set(rates)) > 2
    resumed = PPO(config, saved, seed=0, temperature=1.0)
    load_optimizer(resumed.optimizer, tmp_path / "optimizer.safetensors")
    resumed.load_state_dict(state)
    assert [update(resumed, scored(saved, batch), iteration=i)["lr"] for i in (4, 5)] == rates[4:]
    assert all(torch.equal(weights(saved)[name], tensor) for name, tensor in weights(policy).items())


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_a_rate_falls_over_the_runs_iterations(kind, middle):
    options = ["num_iterations=8", f"algorithm.lr_schedule={kind}", "algorithm.lr_final=0.1"]
    options.append("algorithm.lr_warmup_iterations=0")
    config = load_config("toy", options)
    learner = new_learner(config, toy_policy(config), Group())
    rates = [learner.algorithm._set_options(i) / config.algorithm.lr for i in (0, 4, 8, 20)]  # pyright: ignore
    assert rates == pytest.approx([1.0, middle, 0.1, 0.1])
    alone = PPO(PPOConfig(lr_schedule="linear"), make()[0], seed=0, temperature=1.0)
    with pytest.raises(ConfigError, match="lr_schedule=linear falls over a run's num_iterations"):
        update(alone, make()[1])


def test_the_critic_has_epochs_of_its_own_after_a_kl_stop():
    runs = {}
    for value_epochs in (None, 5):
        policy, batch = make()
        config = PPOConfig(
            epochs=3, value_epochs=value_epochs, minibatch_size=24, lr=3e-2, target_kl=1e-4, warmup_iterations=0
        )
        runs[value_epochs] = update(PPO(config, policy, seed=1, temperature=1.0), batch), weights(policy)
    (stats, then), (own, now) = runs[None], runs[5]
    # 48 rows in two minibatches: too far after the first epoch; the critic goes on for all five.
    assert (stats["policy_steps"], stats["value_steps"]) == (2, 2)
    assert (own["policy_steps"], own["value_steps"]) == (2, 10)
    assert torch.equal(then["logits"], now["logits"]) and not torch.equal(then["value"], now["value"])
    # Without a stop the policy makes its epochs, the critic the rest alone: five epochs of it are five epochs.
    alone, batch = make()
    update(
        PPO(PPOConfig(epochs=5, minibatch_size=24, lr=3e-2), alone, seed=1, temperature=1.0), batch, train_policy=False
    )
    assert torch.equal(weights(alone)["value"], now["value"])
    with pytest.raises(ValueError, match="value_epochs=1 are fewer than epochs=2"):
        PPOConfig(epochs=2, value_epochs=1)


def test_dual_clip_bounds_the_loss_of_bad_actions():
    """max(min(r A, clip(r) A), c A) for negative A, as Ye et al. define it; by hand at c = 3, eps = 0.2."""
    ratio = torch.tensor([0.5, 1.0, 2.0, 5.0, 5.0, 0.5])
    advantages = torch.tensor([-1.0, -1.0, -1.0, -2.0, 2.0, 2.0])
    logs = ratio.log()[:, None].requires_grad_()
    loss, stats = policy_loss(
        logs, torch.zeros(6, 1), advantages, torch.ones(6, 1, dtype=torch.bool),
        clip_eps_low=0.2, clip_eps_high=0.2, ratio_level="action", dual_clip=3.0,
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.tensor([0.8, 1.0, 2.0, 6.0, -2.4, -1.0]))
    loss.sum().backward()
    assert logs.grad is not None
    cut = (logs.grad[:, 0] == 0).tolist()
    assert cut == [True, False, False, True, True, False] and stats["clip_frac"].item() == pytest.approx(0.5)


def test_an_entropy_below_its_floor_raises_the_bonus():
    assert entropy_bonus(0.0, 0.9, floor=1.0, step=0.01) == 0.01
    assert entropy_bonus(0.03, 1.1, floor=1.0, step=0.01) == pytest.approx(0.02)
    assert entropy_bonus(0.005, 1.0, floor=1.0, step=0.01) == 0.0
    assert entropy_bonus(0.02, float("nan"), floor=1.0, step=0.01) == 0.02
    policy, batch = make()
    options = {"lr": 1e-2, "minibatch_size": 48, "epochs": 1, "warmup_iterations": 0}
    held = PPOConfig(entropy_coef=0.1, entropy_floor=9.0, entropy_step=0.5, **options)  # 9 > log 256
    algorithm = PPO(held, policy, seed=0, temperature=1.0)
    coefs = []
    for iteration in range(3):
        before = copy.deepcopy(policy), copy.deepcopy(algorithm.optimizer.state_dict())
        now = scored(policy, batch)
        stats = update(algorithm, now, iteration=iteration)
        coefs.append(stats["entropy_coef"])
        assert stats["entropy_low"]
        # The step is that of a fixed coefficient of the same size.
        fixed = PPO(PPOConfig(entropy_coef=stats["entropy_coef"], **options), before[0], seed=0, temperature=1.0)
        fixed.optimizer.load_state_dict(before[1])
        update(fixed, now, iteration=iteration)
        assert torch.equal(weights(before[0])["logits"], weights(policy)["logits"])
    assert coefs == pytest.approx([0.1, 0.6, 1.1])
    resumed = PPO(held, policy, seed=0, temperature=1.0)
    resumed.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert update(resumed, scored(policy, batch), iteration=3)["entropy_coef"] == pytest.approx(1.6)
    low = PPO(PPOConfig(entropy_floor=1e-3, **options), make()[0], seed=0, temperature=1.0)
    assert not update(low, batch)["entropy_low"]


def test_projector_trunk_and_head_have_their_own_rates(tmp_path):
    """AdamW's first step moves each weight by its rate, whatever the size of its gradient."""
    config = toy_config()
    policy = toy_policy(config)
    options = {"lr": 1e-3, "minibatch_size": 8, "epochs": 1, "warmup_iterations": 0, "adam_eps": 1e-12}
    parts = PPO(PPOConfig(projector_lr=4e-3, head_lr=2e-3, **options), policy, seed=0, temperature=1.0)
    before = {name: tensor.detach().clone() for name, tensor in policy.named_parameters()}
    update(parts, observed(policy, config))
    moved = {"projector.": 4e-3, "language_model.model.": 1e-3, "language_model.lm_head.": 2e-3}
    for prefix, lr in moved.items():
        steps = [(t - before[n]).abs().max().item() for n, t in policy.named_parameters() if n.startswith(prefix)]
        assert max(steps) == pytest.approx(lr, rel=1e-3), prefix
    # A checkpoint of one group fits, and the other way round: the parameters are the same in the same order.
    one = PPO(PPOConfig(**options), policy, seed=0, temperature=1.0)
    for source, target in ((parts, one), (one, parts)):
        save_optimizer(source.optimizer, tmp_path / "optimizer.safetensors")
        load_optimizer(target.optimizer, tmp_path / "optimizer.safetensors")
    with pytest.raises(ConfigError, match="TablePolicy names no trained weights of a head"):
        PPO(PPOConfig(head_lr=1e-3), make()[0], seed=0, temperature=1.0)


def observed(policy, config) -> Batch:
    """Eight of the policy's own decisions on noise."""
    rng = np.random.default_rng(0)
    size = config.env.image_size
    images = rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    inputs = policy.encode(Observation(images={"camera": images}, instructions=("move to the red square",) * 8))
    sample = policy.act(inputs, noise=EpisodeNoise(policy, [np.random.default_rng(row) for row in range(8)]))
    return Batch(
        inputs=inputs.rows,
        rows=torch.arange(8),
        token_ids=sample.token_ids,
        token_mask=sample.token_mask,
        malformed=sample.malformed,
        behaviour_logprobs=sample.logprobs,
        old_logprobs=sample.logprobs,
        old_values=sample.values,
        advantages=torch.from_numpy(rng.normal(size=8).astype(np.float32)),
        returns=torch.from_numpy(rng.normal(size=8).astype(np.float32)),
    )
