"""Choosing among all tokens: for comparison with the released `generate`."""

import numpy as np
import torch
from small_policy import inputs, small

from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.sequence import arrange
from reachrl.testing.conformance_policy import check_policy
from reachrl.types import Observation


def test_it_is_the_softmax_over_every_token_and_keeps_the_contract(base) -> None:
    policy = OpenVLAPolicy(small(checkpoint=base, vocabulary="full"))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    check_policy(
        policy, Observation(images={"camera": images}, instructions=("push the puck", "close it", "open the window"))
    )
    rows = inputs(policy)
    sample = policy.act(rows)
    # The first token again, by transformers' own forward pass with the whole head.
    embeds, valid = arrange(policy.language_model.model, policy.projector(policy._features(rows)), rows)
    logits = policy.language_model(inputs_embeds=embeds, attention_mask=valid.long(), position_ids=(
        valid.long().cumsum(1) - 1).clamp_min(0)).logits[:, -1]  # fmt: skip
    assert torch.equal(sample.token_ids[:, 0], logits.argmax(-1))
    expected = logits.log_softmax(-1).gather(1, sample.token_ids[:, :1]).squeeze(1)
    assert torch.allclose(sample.logprobs[:, 0], expected, atol=1e-5)
    assert policy.num_choices == policy.config.language_model.vocab_size == logits.shape[1]


def test_tokens_that_are_no_actions_decode_to_the_nearest_bin(base) -> None:
    policy = OpenVLAPolicy(small(checkpoint=base, vocabulary="full"))
    policy.set_action_stats(-np.ones(4), np.ones(4), np.ones(4, bool))
    ids = torch.tensor([[0, policy.first_action_id - 1, policy.first_action_id, 1087]])
    assert np.allclose(policy.decode_actions(ids)[:, 0], [[254 / 255, 254 / 255, 254 / 255, -254 / 255]], atol=1e-6)


def test_the_two_vocabularies_choose_alike_where_actions_are_likeliest(base) -> None:
    few, all_tokens = OpenVLAPolicy.from_pretrained(base), OpenVLAPolicy(small(checkpoint=base, vocabulary="full"))
    with torch.no_grad():
        for policy in (few, all_tokens):
            policy.language_model.lm_head.weight[: policy.first_action_id] = 0
            policy.language_model.lm_head.weight[policy.config.language_model.vocab_end :] = 0
    ours, theirs = few.act(inputs(few)), all_tokens.act(inputs(all_tokens))
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert (ours.logprobs > theirs.logprobs).all()  # the rest of the vocabulary takes its share
