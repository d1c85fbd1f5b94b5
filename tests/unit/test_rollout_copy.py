"""The copy that decodes: the trained policy's function, always the newest, never drifting."""

from pathlib import Path

import pytest
import torch
from small_policy import adapted, inputs, small

from reachrl.policies.llama import decoder_layers
from reachrl.policies.openvla.policy import OpenVLAPolicy


def greedy(policy: OpenVLAPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    sample = policy.act(inputs(policy))
    return sample.token_ids, sample.logprobs


@pytest.mark.parametrize("parts", [("language_model",), ("language_model", "projector")])
def test_the_copy_decodes_as_the_adapters_do(base: Path, parts: tuple[str, ...]) -> None:
    plain = adapted(base, critic="adapter", lora={"parts": parts})
    copied = adapted(base, critic="adapter", lora={"parts": parts}, rollout_copy=True)
    (ids, logprobs), (others, theirs) = greedy(plain), greedy(copied)
    assert torch.equal(ids, others)
    assert torch.allclose(logprobs, theirs, atol=1e-5)
    assert torch.allclose(plain.act(inputs(plain)).values, copied.act(inputs(copied)).values, atol=1e-5)
    assert copied._rollout is not None
    layer = decoder_layers(copied._rollout.model)[0]
    assert (
        layer.self_attn.k_proj.weight.data_ptr() != layer.self_attn.fused_qkv.weight.data_ptr()
    )  # a view further down
    assert layer.self_attn.q_proj.weight.data_ptr() == layer.self_attn.fused_qkv.weight.data_ptr()


@pytest.mark.parametrize("foreach", [False, True])
def test_it_follows_every_optimiser_step(base: Path, foreach: bool) -> None:
    policy = adapted(base, rollout_copy=True)
    greedy(policy)
    optimizer = torch.optim.AdamW(policy.parameter_groups()["trunk"], lr=0.05, foreach=foreach)
    for _ in range(2):
        ids = torch.arange(12).view(3, 4) + policy.first_action_id
        policy.evaluate(inputs(policy), ids).logprobs.sum().backward()
        optimizer.step()
        sample = policy.act(inputs(policy))
        scored = policy.evaluate(inputs(policy), sample.token_ids).logprobs
        assert torch.allclose(sample.logprobs, scored, atol=1e-5)


def test_it_follows_restored_weights_and_whole_weights(base: Path, tmp_path: Path) -> None:
    adapted(base, seed=5).save_pretrained(tmp_path / "policy")
    policy = adapted(base, seed=1, rollout_copy=True)
    before = greedy(policy)[1]
    policy.restore(tmp_path / "policy")
    assert not torch.allclose(before, greedy(policy)[1], atol=1e-3)
    assert torch.allclose(greedy(adapted(base, seed=5))[1], greedy(policy)[1], atol=1e-5)
    whole = OpenVLAPolicy(small(checkpoint=base, rollout_copy=True))
    greedy(whole)
    with torch.no_grad():
        whole.language_model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    sample = whole.act(inputs(whole))
    assert torch.allclose(sample.logprobs, whole.evaluate(inputs(whole), sample.token_ids).logprobs, atol=1e-5)


def test_fifty_updates_later_nothing_has_drifted(base: Path) -> None:
    """In bfloat16, where merging and unmerging in place loses a little every time."""
    policy = adapted(base, rollout_copy=True, dtype="bfloat16")
    first = greedy(policy)[1]
    weights = list(policy.parameter_groups()["trunk"])
    kept = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for _ in range(50):
            for p in weights:
                p.add_(torch.randn_like(p) * 0.1)
            policy.act(inputs(policy))
            for p, k in zip(weights, kept, strict=True):
                p.copy_(k)
    assert torch.equal(greedy(policy)[1], first)


def test_the_copy_is_no_part_of_what_is_saved_or_trained(base: Path) -> None:
    policy = adapted(base, rollout_copy=True)
    names, count = set(policy.state_dict()), len(list(policy.parameters()))
    greedy(policy)
    assert set(policy.state_dict()) == names and len(list(policy.parameters())) == count
    assert policy._rollout is not None
    norm = policy.language_model.model.norm.weight
    assert policy._rollout.model.norm.weight is norm  # shared: nothing adapts it
