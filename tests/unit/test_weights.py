"""Weights that travel: every tensor arrives, nothing else passes for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_policy import PROBE, adapted, inputs, packed, shown
from toy_policy import toy_config, toy_policy

from reachrl.backends.learner import LocalLearner
from reachrl.backends.weights import acting_parameters, actor_gap, load_packed, pack
from reachrl.config.ppo import PPOConfig
from reachrl.errors import WorkerError
from reachrl.policies.openvla.policy import OpenVLAPolicy


def acted(policy: OpenVLAPolicy) -> torch.Tensor:
    """Log-probs on the path of a rollout."""
    return policy.act(inputs(policy)).logprobs


@pytest.mark.parametrize("parts", [("language_model", "projector"), ("language_model", "projector", "vision")])
@pytest.mark.parametrize("copy", [False, True])
def test_every_adapter_tensor_changes_how_the_actor_acts(base: Path, copy: bool, parts: tuple[str, ...]) -> None:
    """Each is changed in the learner alone; after the transfer the actor acts as the learner, not as before."""
    options = {"lora": {"parts": parts}, "rollout_copy": copy, "critic": "adapter"}
    learner, actor = adapted(base, **options), adapted(base, seed=2, **options)
    vision = "vision" in parts
    load_packed(actor, packed(learner, train_vision=vision), train_vision=vision)
    assert torch.allclose(acted(actor), acted(learner), atol=1e-5)
    names = [name for name, _ in acting_parameters(learner, train_vision=vision)]
    assert len(names) == 2 * (3 * 7 + 2 + 2 * 4 * vision) and names == sorted(names)
    before = acted(actor)
    for name in names:
        tensor = dict(learner.named_parameters())[name]
        unchanged = tensor.detach().clone()
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor))
        weights = packed(learner, train_vision=vision)
        load_packed(actor, weights, train_vision=vision)
        after = acted(actor)
        assert (after - before).abs().max() > 2e-5, name
        assert (after - acted(learner)).abs().max() < 5e-6, name
        assert actor_gap(actor, weights, **PROBE) < 1e-4
        with torch.no_grad():
            tensor.copy_(unchanged)


def test_the_critic_and_the_frozen_base_stay_at_home(base: Path) -> None:
    learner = adapted(base, critic="adapter")
    sent = {info.name for bucket in packed(learner).buckets for info in bucket.tensors}
    assert sent and all(".lora_" in name and ".default." in name for name in sent)
    whole = {name for name, _ in acting_parameters(OpenVLAPolicy.from_pretrained(base), train_vision=False)}
    assert any(name.startswith("language_model.lm_head") for name in whole)
    assert not any(name.startswith(("vision_backbone.", "value_head.", "critic.")) for name in whole)


@pytest.mark.parametrize("bucket_bytes", [1, 300, 2**20])
def test_buckets_of_any_size_carry_the_same_bits(bucket_bytes: int) -> None:
    torch.manual_seed(0)
    tensors = [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7).to(torch.bfloat16)),
        ("c", torch.arange(4)),
        ("d", torch.tensor(2.5)),
        ("e", torch.randn(40, 2).t()),  # not contiguous
    ]
    buckets = pack(iter(tensors), bucket_bytes=bucket_bytes)
    found = [(info.name, tensor) for bucket in buckets for info, tensor in bucket.unpack()]
    assert [name for name, _ in found] == [name for name, _ in tensors]
    assert all(one.equal(two) and one.dtype == two.dtype for (_, one), (_, two) in zip(found, tensors, strict=True))
    assert all(bucket.data.nbytes <= max(bucket_bytes, 320) for bucket in buckets)
    assert (len(buckets) == 1) == (bucket_bytes == 2**20)


def test_what_is_not_the_learners_weights_is_refused() -> None:
    config = toy_config()
    learner, actor = toy_policy(config, seed=1), toy_policy(config, seed=2)
    weights = packed(learner)
    before = [p.clone() for p in actor.parameters()]
    bucket = weights.buckets[0]
    swapped = replace(bucket, tensors=(bucket.tensors[1], bucket.tensors[0], *bucket.tensors[2:]))
    fewer = replace(bucket, tensors=bucket.tensors[1:])
    for wrong in (swapped, fewer):
        with pytest.raises(WorkerError, match="the first difference"):
            load_packed(actor, replace(weights, buckets=(wrong,)), train_vision=False)
    data = bucket.data.copy()
    data[1000] ^= 1
    with pytest.raises(WorkerError, match="damaged"):
        load_packed(actor, replace(weights, buckets=(replace(bucket, data=data),)), train_vision=False)
    assert all(p.equal(q) for p, q in zip(actor.parameters(), before, strict=True))
    # Weights that were never loaded, and ones that were loaded but are not what `act` reads: the fixed batch tells.
    with pytest.raises(WorkerError, match="does not act with the weights"):
        actor_gap(actor, weights, **PROBE | {"shown": shown(24)})


def test_a_copy_for_decoding_that_is_not_formed_anew_is_noticed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug of the first implementations: adapters arrive, but what decodes was merged before."""
    learner, actor = adapted(base, rollout_copy=True), adapted(base, seed=2, rollout_copy=True)
    acted(actor)
    monkeypatch.setattr("reachrl.policies.decoding.rollout_copy.RolloutCopy.update", lambda self: None)
    weights = packed(learner)
    load_packed(actor, weights, train_vision=False)
    with pytest.raises(WorkerError, match="does not act with the weights"):
        actor_gap(actor, weights, **PROBE)


def test_the_probe_looks_at_the_temperature_too() -> None:
    policy = toy_policy(toy_config(), seed=1)
    with torch.no_grad():
        policy.language_model.lm_head.weight.normal_(std=1.0)
    learner = LocalLearner(policy, PPOConfig(), seed=3, temperature=1.2)
    weights = learner.pack_weights(shown=shown(24))
    assert actor_gap(policy, weights, seed=3, shown=shown(24), temperature=1.2) < 1e-5
    with pytest.raises(WorkerError):
        actor_gap(policy, weights, seed=3, shown=shown(24), temperature=1.0)
    assert np.isfinite(weights.probe_logprobs).all() and sum(bucket.data.nbytes for bucket in weights.buckets) == sum(
        p.numel() * 4 for _, p in acting_parameters(policy, train_vision=False)
    )
