"""Rows of different lengths: every figure of a masked batch is that of the rows cut to their own tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reachrl.algorithms.base import Batch
from reachrl.algorithms.grpo import GRPO
from reachrl.config.grpo import GRPOConfig
from reachrl.errors import ConfigError, ExtensionError
from reachrl.functional.ppo import evened, importance_weights, policy_loss, token_kl
from reachrl.rollout.acting import answer
from reachrl.rollout.join import join_rollouts
from reachrl.testing.conformance_policy import check_policy
from reachrl.testing.policies import TablePolicy, TablePolicyConfig, given_noise
from reachrl.testing.rewards import make_rollout
from reachrl.types import Observation

SLOTS, LOW, HIGH = 6, 0.2, 0.3
LENGTHS = (6, 1, 3, 2, 5)
ACTIONS = torch.tensor([0, 0, 1, 1, 2, 2])  # three actions of two tokens


def rows_of(seed):
    """Log-probs of rows cut to their lengths, as lists, and the same as a block with rubbish in the other slots."""
    rng = np.random.default_rng(seed)
    cut = [rng.normal(-3, 0.3, length).tolist() for length in LENGTHS]
    block = torch.full((len(LENGTHS), SLOTS), math.nan, dtype=torch.float64)
    for row, values in enumerate(cut):
        block[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return cut, block


MASK = torch.tensor([[slot < length for slot in range(SLOTS)] for length in LENGTHS])


def clipped(log_ratio, advantage):
    ratio = math.exp(log_ratio)
    return -min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)


def log_ratios(new, old, level):
    """The ratios of one row, from its own tokens alone."""
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    if level == "token":
        return gaps
    if level == "chunk":
        return [sum(gaps)]
    return [sum(gaps[first : first + 2]) for first in range(0, len(gaps), 2)]


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_the_loss_is_that_of_rows_cut_to_their_lengths(level):
    (new, new_block), (old, old_block) = rows_of(0), rows_of(1)
    new_block.requires_grad_()
    advantages = [1.0, -0.5, 0.7, -2.0, 0.3]
    loss, stats = policy_loss(
        new_block, old_block, torch.tensor(advantages, dtype=torch.float64), MASK,
        clip_eps_low=LOW, clip_eps_high=HIGH, ratio_level=level, token_actions=ACTIONS,
    )  # fmt: skip
    logs = [log_ratios(a, b, level) for a, b in zip(new, old, strict=True)]
    terms = [[clipped(each, advantage) for each in row] for row, advantage in zip(logs, advantages, strict=True)]
    assert loss.tolist() == pytest.approx([sum(row) / len(row) for row in terms])
    assert stats["log_ratio_max"].item() == pytest.approx(max(abs(each) for row in logs for each in row))
    cut = [
        [clipped(each, a) > -math.exp(each) * a + 1e-12 for each in row]
        for row, a in zip(logs, advantages, strict=True)
    ]
    assert stats["clip_frac"].item() == pytest.approx(np.mean([np.mean(row) for row in cut]))
    assert 0 < stats["clip_frac"].item() < 1
    loss.sum().backward()
    assert new_block.grad is not None
    assert not new_block.grad[~MASK].any()


def test_kl_and_importance_count_a_rows_own_tokens():
    (new, new_block), (old, old_block) = rows_of(2), rows_of(3)
    gaps = [np.array(a) - np.array(b) for a, b in zip(new, old, strict=True)]
    kl = token_kl(new_block, old_block, MASK)
    assert kl.tolist() == pytest.approx([float(np.mean(np.exp(gap) - 1 - gap)) for gap in gaps])
    weights = importance_weights(new_block, old_block, MASK, cap=1.5)
    assert weights.tolist() == pytest.approx([min(math.exp(gap.sum()), 1.5) for gap in gaps])
    assert evened(new_block, MASK).mean().item() == pytest.approx(np.mean([np.mean(row) for row in new]))


class ShortAnswers(TablePolicy):
    """A token below 64 ends the answer; what is scored behind it is not a number."""

    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        sample = super().act(inputs, temperature=temperature, noise=noise)
        ends = (sample.token_ids < 64).long().cumsum(1)
        mask = (ends - (sample.token_ids < 64).long()) == 0
        return replace(
            sample,
            token_ids=sample.token_ids.where(mask, 0),
            token_mask=mask,
            logprobs=sample.logprobs.where(mask, 0),
            malformed=~(ends > 0).any(1),
        )

    def evaluate(self, inputs, token_ids, token_mask, *, temperature=1.0, with_values=True):
        out = super().evaluate(inputs, token_ids, temperature=temperature, with_values=with_values)
        nowhere = torch.full_like(out.logprobs, math.nan)
        return replace(
            out,
            logprobs=out.logprobs.where(token_mask, nowhere),
            entropy=out.entropy.where(token_mask, nowhere),
        )


def test_an_update_equals_autograd_over_rows_cut_to_their_lengths():
    """Loss, entropy bonus and KL of a whole update, in micro-batches, against one row after the other."""
    torch.manual_seed(0)
    policy = ShortAnswers(TablePolicyConfig(num_contexts=2, num_action_tokens=4))
    torch.nn.init.normal_(policy.logits)
    images = (np.arange(24) % 2).astype(np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
    inputs = policy.encode(Observation(images={"camera": images}, instructions=("",) * 24))
    sample = policy.act(inputs, noise=given_noise(-torch.empty(24, 4, 256).exponential_().log()))
    lengths = sample.token_mask.sum(1)
    assert len(lengths.unique()) == 4
    advantages = torch.randn(24)
    before = policy.logits.detach().clone().requires_grad_()
    batch = Batch(
        inputs=inputs.rows,
        rows=torch.arange(24),
        token_ids=sample.token_ids,
        token_mask=sample.token_mask,
        malformed=sample.malformed,
        behaviour_logprobs=sample.logprobs,
        old_logprobs=sample.logprobs,
        advantages=advantages,
    )
    config = GRPOConfig(
        epochs=1, minibatch_size=24, micro_batch_size=7, lr=1e-2, entropy_coef=0.5, ratio_level="token",
        max_grad_norm=1e9, weight_decay=0.0,
    )  # fmt: skip
    algorithm = GRPO(config, policy, seed=0, temperature=1.0)
    stats = algorithm.update(batch, iteration=0)

    table = before.log_softmax(-1)
    losses, entropies = [], []
    for row in range(24):
        tokens, own = sample.token_ids[row, : lengths[row]], table[row % 2, : lengths[row]]
        logprobs = own.gather(1, tokens[:, None])[:, 0]
        losses.append(-(advantages[row] * (logprobs - logprobs.detach()).exp()).mean())
        entropies.append(-(own.exp() * own).sum(-1).mean())
    (torch.stack(losses).mean() - 0.5 * torch.stack(entropies).mean()).backward()
    torch.optim.AdamW([before], lr=1e-2, eps=1e-5, weight_decay=0.0).step()
    torch.testing.assert_close(policy.logits, before, atol=1e-6, rtol=1e-5)
    assert stats["entropy"] == pytest.approx(torch.stack(entropies).mean().item(), rel=1e-5)
    after, moved = policy.logits.log_softmax(-1).detach(), []
    for row in range(24):
        tokens = sample.token_ids[row, : lengths[row]]
        gap = [float((after - table.detach())[row % 2, slot, token]) for slot, token in enumerate(tokens.tolist())]
        moved.append(float(np.mean(np.exp(gap) - 1 - gap)))
    assert stats["kl"] == pytest.approx(np.mean(moved), rel=1e-3)


class WholeChunks(TablePolicy):
    num_actions = 2


def test_a_ratio_of_actions_needs_tokens_that_belong_to_them():
    policy = WholeChunks(TablePolicyConfig(num_action_tokens=4))
    with pytest.raises(ConfigError, match=r"ratio_level=action.*WholeChunks.*2 actions.*chunk or token"):
        GRPO(GRPOConfig(), policy, seed=0, temperature=1.0)
    GRPO(GRPOConfig(ratio_level="chunk"), policy, seed=0, temperature=1.0)


class ReadsBehindTheEnd(ShortAnswers):
    def evaluate(self, inputs, token_ids, token_mask, *, temperature=1.0, with_values=True):
        out = super().evaluate(inputs, token_ids, token_mask, temperature=temperature, with_values=with_values)
        return replace(out, logprobs=out.logprobs + 0.01 * token_ids.where(~token_mask, 0).sum(1, keepdim=True))


class KeepsTheRest(ShortAnswers):
    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        sample = super().act(inputs, temperature=temperature, noise=noise)
        return replace(sample, token_ids=sample.token_ids.where(sample.token_mask, 7))


class SaysNothing(ShortAnswers):
    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        sample = super().act(inputs, temperature=temperature, noise=noise)
        mask = sample.token_mask & (torch.arange(len(sample.token_ids)) != 1)[:, None]
        return replace(
            sample, token_mask=mask, token_ids=sample.token_ids.where(mask, 0), logprobs=sample.logprobs.where(mask, 0)
        )


def short(kind):
    torch.manual_seed(0)
    policy = kind(TablePolicyConfig(num_contexts=256, num_action_tokens=4))
    torch.nn.init.normal_(policy.logits)
    images = np.random.default_rng(0).integers(0, 255, (12, 4, 4, 3), dtype=np.uint8)
    return policy, Observation(images={"camera": images}, instructions=("do it",) * 12)


def test_answers_of_different_lengths_keep_the_contract():
    check_policy(*short(ShortAnswers))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ReadsBehindTheEnd, "evaluate's log-probs depend on what stands outside the mask"),
        (KeepsTheRest, r"outside the mask; expected 0 and 0"),
        (SaysNothing, r"SaysNothing\.act answered row 1 without any token"),
    ],
)
def test_a_broken_promise_about_the_mask_is_named(broken, message):
    with pytest.raises(ExtensionError, match=message):
        check_policy(*short(broken))


def test_the_safe_action_stands_in_for_malformed_answers():
    policy, observation = short(ShortAnswers)
    policy.safe_action = np.array([0.5, -0.25, 0.0, 1.0])
    sample, actions = answer(policy, policy.encode(observation), temperature=1.0, noise=None, with_values=False)
    assert 0 < sample.malformed.sum() < 12
    for row, malformed in enumerate(sample.malformed.tolist()):
        own = sample.token_ids[row].numpy() / 127.5 - 1
        np.testing.assert_allclose(actions[row], [policy.safe_action if malformed else own], atol=1e-6)


def test_rows_that_lengthen_a_rollout_are_no_data_but_can_be_scored():
    """Of two actors with whole episodes one is done earlier; a token id that no policy has would end the scoring."""
    long, brief = make_rollout(num_steps=6, num_envs=2), make_rollout(num_steps=4, num_envs=1, seed=1)
    brief = replace(brief, token_ids=brief.token_ids + 31744)
    joined = join_rollouts([long, brief])
    assert joined.valid.shape == (6, 3) and not joined.valid[4:, 2].any()
    assert not (joined.success | joined.terminated | joined.truncated)[4:, 2].any()
    assert (joined.token_ids[4:, 2] == 31744).all() and joined.token_mask[4:, 2].all()
    assert np.array_equal(joined.token_ids[:, :2], long.token_ids)
