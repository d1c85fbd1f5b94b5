"""PPO's update: exact accumulation, warm-up, KL stop, divergence, against plain autograd."""

import copy
import json

import numpy as np
import pytest
import torch

from reachrl.algorithms.base import Batch
from reachrl.algorithms.ppo import PPO
from reachrl.config.ppo import PPOConfig
from reachrl.errors import DivergedError, ExtensionError
from reachrl.functional.ppo import policy_loss, value_loss
from reachrl.run.optimizer_state import load_optimizer, save_optimizer
from reachrl.testing.policies import TablePolicy, TablePolicyConfig, given_noise
from reachrl.types import Observation


def make(seed=0, rows=48):
    """A policy with random logits and a batch of its own samples."""
    generator = torch.Generator().manual_seed(seed)
    policy = TablePolicy(TablePolicyConfig())
    with torch.no_grad():
        policy.logits.copy_(torch.randn(policy.logits.shape, generator=generator))
    contexts = torch.randint(0, 2, (rows,), generator=generator)
    images = contexts.numpy().astype(np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
    inputs = policy.encode(Observation(images={"camera": images}, instructions=("",) * rows))
    gumbel = -torch.empty(rows, 2, 256).exponential_(generator=generator).log()
    sample = policy.act(inputs, noise=given_noise(gumbel))
    batch = Batch(
        inputs=inputs.rows,
        rows=torch.arange(rows),
        token_ids=sample.token_ids,
        token_mask=sample.token_mask,
        malformed=sample.malformed,
        behaviour_logprobs=sample.logprobs,
        old_logprobs=sample.logprobs,
        old_values=sample.values,
        advantages=torch.randn(rows, generator=generator),
        returns=torch.randn(rows, generator=generator),
    )
    return policy, batch


def update(algorithm, batch, *, iteration=0, train_policy=True):
    """One update that trains the policy, or as in warm-up the critic alone."""
    algorithm.warming_up = not train_policy
    return algorithm.update(batch, iteration=iteration)


def weights(policy):
    return {name: tensor.detach().clone() for name, tensor in policy.named_parameters()}


@pytest.mark.parametrize("micro", [48, 16, 7, 1])
def test_the_micro_batch_does_not_change_the_update(micro):
    policy, batch = make()
    other = copy.deepcopy(policy)
    config = PPOConfig(epochs=3, minibatch_size=24, micro_batch_size=48, lr=1e-2, warmup_iterations=0)
    update(PPO(config, policy, seed=1, temperature=1.0), batch)
    update(PPO(config.model_copy(update={"micro_batch_size": micro}), other, seed=1, temperature=1.0), batch)
    for name, tensor in weights(policy).items():
        torch.testing.assert_close(weights(other)[name], tensor, atol=2e-6, rtol=1e-5)


def test_one_minibatch_equals_plain_autograd_and_adamw():
    policy, batch = make()
    reference = copy.deepcopy(policy)
    config = PPOConfig(
        epochs=1, minibatch_size=48, micro_batch_size=48, lr=1e-2, value_lr=1e-3, entropy_coef=0.01, max_grad_norm=1e9
    )
    update(PPO(config, policy, seed=3, temperature=1.0), batch)

    out = reference.evaluate(batch.inputs(torch.arange(48)), batch.token_ids)
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    surrogate, _ = policy_loss(
        out.logprobs,
        batch.old_logprobs,
        advantages,
        batch.token_mask,
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        ratio_level="action",
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
    stats = update(PPO(PPOConfig(minibatch_size=16), policy, seed=0, temperature=1.0), batch, train_policy=False)
    after = weights(policy)
    assert torch.equal(before["logits"], after["logits"]) and torch.equal(before["features"], after["features"])
    assert not torch.equal(before["value"], after["value"])
    assert stats["policy_steps"] == 0 and stats["value_steps"] == 6
    unseen = (stats["loss/policy"], stats["entropy"], stats["kl"], stats["clip_frac"], stats["grad_norm"])
    assert np.isnan(unseen).all() and np.isfinite([stats["loss/value"], stats["value_grad_norm"]]).all()


def test_zero_advantage_leaves_the_policy_still():
    policy, batch = make()
    before = weights(policy)
    still = changed(batch, advantages=torch.zeros(48))
    update(PPO(PPOConfig(minibatch_size=16), policy, seed=0, temperature=1.0), still)
    assert torch.equal(before["logits"], weights(policy)["logits"])


def changed(batch, **fields):
    """The batch with other fields."""
    return Batch(**{name: getattr(batch, name) for name in batch.__slots__} | fields)


def passes(batch):
    """The batch, and a list that the sizes and rows of the passes over it come into."""
    seen = []

    def inputs(rows):
        seen.append(rows.tolist())
        return batch.inputs(rows)

    return changed(batch, inputs=inputs), seen


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [
        (513, 256, [171] * 3),
        (512, 256, [256] * 2),
        (257, 256, [129, 128]),
        (1920, 256, [240] * 8),  # the quickstart's
        (7, 3, [3, 2, 2]),
        (5, 256, [5]),
        (3, 1, [1] * 3),
    ],
)
def test_minibatches_are_equal_parts_of_all_rows(rows, most, sizes):
    policy, batch = make(rows=rows)
    batch, seen = passes(batch)
    config = PPOConfig(epochs=2, minibatch_size=most, micro_batch_size=4096, warmup_iterations=0, lr=1e-6)
    stats = update(PPO(config, policy, seed=0, temperature=1.0), batch)
    assert stats["policy_steps"] == stats["value_steps"] == 2 * len(sizes)
    first, second = seen[: len(sizes)], seen[len(sizes) : 2 * len(sizes)]
    for epoch in (first, second):
        assert [len(part) for part in epoch] == sizes
        assert sorted(row for part in epoch for row in part) == list(range(rows))
    assert rows == 3 or first != second  # another order


def test_micro_batches_are_equal_parts_of_a_minibatch():
    policy, batch = make(rows=50)
    batch, seen = passes(batch)
    config = PPOConfig(epochs=1, minibatch_size=25, micro_batch_size=8, warmup_iterations=0)
    update(PPO(config, policy, seed=0, temperature=1.0), batch)
    assert [len(part) for part in seen[:8]] == [7, 6, 6, 6] * 2


def test_each_step_is_that_of_the_mean_over_its_own_minibatch():
    policy, batch = make(rows=50)
    reference = copy.deepcopy(policy)
    recorded, seen = passes(batch)
    config = PPOConfig(epochs=1, minibatch_size=20, micro_batch_size=20, lr=1e-2, value_lr=1e-2, max_grad_norm=1e9)
    update(PPO(config, policy, seed=3, temperature=1.0), recorded)

    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    groups = [{"params": [reference.logits], "lr": 1e-2}, {"params": [reference.value], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    for rows in map(torch.tensor, seen[:3]):
        out = reference.evaluate(batch.inputs(rows), batch.token_ids[rows])
        ratio = (out.logprobs - batch.old_logprobs[rows]).sum(-1).exp()
        surrogate = torch.min(ratio * advantages[rows], ratio.clamp(0.8, 1.28) * advantages[rows])
        error = torch.nn.functional.huber_loss(out.values, batch.returns[rows])
        optimizer.zero_grad()
        (-surrogate.mean() + 0.5 * error).backward()
        optimizer.step()
    torch.testing.assert_close(policy.logits, reference.logits)
    torch.testing.assert_close(policy.value, reference.value)


def kl_per_token(policy, batch):
    """Between the batch's old policy and the one there is now, with numpy alone."""
    table = policy.logits.detach().double().numpy()
    table = table - np.log(np.exp(table).sum(-1, keepdims=True))
    contexts = batch.inputs(torch.arange(len(batch.token_ids))).pixels[:, 0].long().numpy()
    ids = batch.token_ids.numpy()
    new = table[contexts[:, None], np.arange(ids.shape[1])[None], ids]
    gap = new - batch.old_logprobs.double().numpy()
    return float(np.mean(np.exp(gap) - 1 - gap))


@pytest.mark.parametrize("changes", [{"minibatch_size": 48}, {"minibatch_size": 5}, {"target_kl": 1e-3, "epochs": 4}])
def test_the_kl_reported_is_that_of_the_whole_batch_after_the_last_step(changes):
    policy, batch = make()
    config = PPOConfig(**{"epochs": 1, "minibatch_size": 16, "lr": 0.1} | changes)
    stats = update(PPO(config, policy, seed=0, temperature=1.0), batch)
    expected = kl_per_token(policy, batch)
    assert expected > 1e-3
    assert stats["kl"] == pytest.approx(expected, rel=1e-5)


def test_the_kl_of_a_large_batch_is_measured_on_a_sample_of_it():
    policy, batch = make(rows=5000)
    config = PPOConfig(epochs=1, minibatch_size=1250, micro_batch_size=5000, score_batch_size=5000, lr=0.05)
    batch, seen = passes(batch)
    stats = update(PPO(config, policy, seed=0, temperature=1.0), batch)
    assert len(set(seen[-1])) == 512
    assert stats["kl"] == pytest.approx(kl_per_token(policy, batch), rel=0.2)


def test_the_kl_stop_ends_policy_steps_but_not_the_critic():
    after = []  # each further step of the policy
    for epochs in range(1, 8):
        policy, batch = make()
        update(PPO(PPOConfig(epochs=epochs, minibatch_size=48, lr=0.05), policy, seed=0, temperature=1.0), batch)
        after.append(kl_per_token(policy, batch))
    assert after == sorted(after)
    policy, batch = make()
    config = PPOConfig(epochs=7, minibatch_size=48, lr=0.05, target_kl=(after[2] + after[3]) / 2)
    stats = update(PPO(config, policy, seed=0, temperature=1.0), batch)
    assert stats["policy_steps"] == 4  # the first after which the policy is too far away
    assert stats["kl"] == pytest.approx(after[3], rel=1e-4)
    assert stats["value_steps"] == 4


def test_a_stop_amid_an_epoch_leaves_its_rest_to_the_critic():
    config = PPOConfig(epochs=1, minibatch_size=150, lr=0.02)  # 600 rows in four steps
    policy, batch = make(rows=600)
    free, after = PPO(config, policy, seed=0, temperature=1.0), []
    free.optimizer.register_step_post_hook(lambda *_: after.append(kl_per_token(policy, batch)))
    update(free, batch, iteration=0, train_policy=True)
    assert len(after) == 4 and after[1] > 2 * after[0]

    policy, batch = make(rows=600)
    config = config.model_copy(update={"epochs": 2, "target_kl": (after[0] * after[1]) ** 0.5})
    stats = update(PPO(config, policy, seed=0, temperature=1.0), batch)
    assert (stats["policy_steps"], stats["value_steps"]) == (2, 4)
    assert kl_per_token(policy, batch) == pytest.approx(after[1], rel=1e-4)
    assert policy.logits.requires_grad


@pytest.mark.parametrize(("epochs", "minibatch", "looks"), [(1, 240, 7), (2, 240, 15), (1, 16, 14), (3, 1920, 2)])
def test_the_stop_looks_after_steps_on_enough_rows(epochs, minibatch, looks):
    policy, batch = make(rows=1920)
    batch, seen = passes(batch)
    config = PPOConfig(epochs=epochs, minibatch_size=minibatch, micro_batch_size=4096, lr=1e-6, target_kl=1.0)
    config = config.model_copy(update={"score_batch_size": 4096})
    update(PPO(config, policy, seed=0, temperature=1.0), batch)
    assert [len(rows) for rows in seen].count(128) == looks and len(seen[-1]) == 512


def test_the_kl_stop_does_not_depend_on_the_number_of_tokens():
    """An action of eight tokens that each move as far as those of an action of two takes as many steps."""
    steps = []
    for copies in (1, 4):
        policy, batch = make()
        wide = TablePolicy(TablePolicyConfig(num_action_tokens=2 * copies))
        with torch.no_grad():
            wide.logits.copy_(policy.logits.repeat(1, copies, 1))
        ids, old = (field.repeat(1, copies) for field in (batch.token_ids, batch.old_logprobs))
        mask = torch.ones_like(ids, dtype=torch.bool)
        wider = changed(batch, token_ids=ids, token_mask=mask, behaviour_logprobs=old, old_logprobs=old)
        # Without a clip that bites, AdamW moves each token by the learning rate.
        config = PPOConfig(
            epochs=6, minibatch_size=48, lr=0.02, target_kl=2e-3, clip_eps_low=0.99, clip_eps_high=99, adam_eps=1e-12,
            max_grad_norm=1e9, ratio_level="token",
        )  # fmt: skip
        stats = update(PPO(config, wide, seed=0, temperature=1.0), wider)
        steps.append((stats["policy_steps"], round(stats["kl"], 6)))
    assert steps[0] == steps[1]
    assert 1 < steps[0][0] < 6


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_stale_old_logprobs_are_refused_whichever_way_they_are_off(shift):
    policy, batch = make()
    before = weights(policy)
    stale = changed(batch, old_logprobs=batch.old_logprobs + shift)
    with pytest.raises(ExtensionError, match=r"ratio of 1\.2214 or its inverse.*`evaluate` must answer the same"):
        update(PPO(PPOConfig(), policy, seed=0, temperature=1.0), stale)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())


def test_an_iteration_without_data_trains_nothing():
    policy, batch = make()
    before = weights(policy)
    rows = torch.arange(0)
    filled = [name for name in batch.__slots__ if isinstance(getattr(batch, name), torch.Tensor)]
    fields = {name: getattr(batch, name)[rows] for name in filled}
    algorithm = PPO(PPOConfig(lr_warmup_iterations=3), policy, seed=0, temperature=1.0)
    stats = update(algorithm, changed(batch, **fields), iteration=0, train_policy=True)
    assert (stats["policy_steps"], stats["value_steps"]) == (0, 0)
    assert np.isnan([stats["loss/value"], stats["kl"], stats["explained_variance"]]).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())
    assert update(algorithm, batch, iteration=1, train_policy=True)["lr"] == stats["lr"]  # it was no step of the ramp


@pytest.mark.parametrize("field", ["returns", "advantages"])
def test_a_loss_that_is_not_finite_stops_before_the_step(field):
    policy, batch = make()
    before = weights(policy)
    broken = changed(batch, **{field: torch.full((48,), float("nan"))})
    with pytest.raises(DivergedError, match="not finite"):
        update(PPO(PPOConfig(), policy, seed=0, temperature=1.0), broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())


def test_the_learning_rate_ramps_from_the_real_end_of_warm_up(tmp_path):
    policy, batch = make()
    config = PPOConfig(lr=1.0, lr_warmup_iterations=3, warmup_iterations=2, target_kl=1e-9)

    def rates(algorithm, iterations, *, train_policy):
        return [update(algorithm, batch, iteration=i, train_policy=train_policy)["lr"] for i in iterations]

    algorithm = PPO(config, policy, seed=0, temperature=1.0)
    still = changed(batch, advantages=torch.zeros(48))  # so that old log-probs stay those of the policy
    batch = still
    assert rates(algorithm, range(6), train_policy=False) == [0.25] * 6  # a warm-up longer than planned
    assert rates(algorithm, range(6, 8), train_policy=True) == [0.25, 0.5]
    save_optimizer(algorithm.optimizer, tmp_path / "optimizer.safetensors")
    resumed = PPO(config, copy.deepcopy(policy), seed=0, temperature=1.0)
    load_optimizer(resumed.optimizer, tmp_path / "optimizer.safetensors")
    resumed.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    for each in (algorithm, resumed):
        assert rates(each, range(8, 11), train_policy=True) == [0.75, 1.0, 1.0]


def test_a_resumed_optimiser_has_the_options_of_now(tmp_path):
    policy, batch = make()
    then = PPOConfig(lr=1e-3, value_lr=1e-3, weight_decay=0.1, adam_eps=1e-5)
    save_optimizer(PPO(then, policy, seed=0, temperature=1.0).optimizer, tmp_path / "optimizer.safetensors")
    now = PPO(PPOConfig(lr=2e-3, value_lr=3e-3, weight_decay=0.0, adam_eps=1e-7), policy, seed=0, temperature=1.0)
    load_optimizer(now.optimizer, tmp_path / "optimizer.safetensors")
    update(now, batch, iteration=0, train_policy=True)
    found = [(group["lr"], group["weight_decay"], group["eps"]) for group in now.optimizer.param_groups]
    assert found == [(2e-3, 0.0, 1e-7), (3e-3, 0.0, 1e-7)]
