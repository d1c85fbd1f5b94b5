"""A run that begins from a policy that another run trained: its critic is kept whole, or begins anew whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_policy import toy_config, toy_policy

from reachrl.backends.policy_loading import new_policy, warm_policy
from reachrl.config.train import TrainConfig
from reachrl.policies.base import Policy
from reachrl.types import Observation

CRITICS = {
    "separate": ("policy.critic=separate",),
    "adapter": ("policy.critic=adapter", "policy.lora.rank=2"),
    "shared": ("policy.critic=shared",),
}


def values(policy: Policy) -> torch.Tensor:
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    with torch.no_grad():
        return policy.values(
            policy.encode(Observation(images={"camera": frames}, instructions=("go to the red square",) * 5))
        )


def trained(tmp_path: Path, critic: str, *overrides: str) -> tuple[TrainConfig, Policy]:
    """A policy whose actor, critic and head went different ways, and the configuration of a run that begins from it."""
    options = CRITICS[critic]
    if critic == "adapter":
        toy_policy(toy_config(), seed=5).save_pretrained(tmp_path / "base")
        options += (f"policy.checkpoint={tmp_path / 'base'}",)
    policy = toy_policy(toy_config(*options))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in [p for group in policy.parameter_groups().values() for p in group]:
            parameter += 0.02 * torch.randn_like(parameter)
    policy.save_pretrained(tmp_path / "first" / "policy")
    return toy_config(*CRITICS[critic], f"policy.checkpoint={tmp_path / 'first' / 'policy'}", *overrides), policy


def begin(config: TrainConfig, tmp_path: Path) -> Policy:
    """As training begins: what the warm start wrote, read back."""
    new_policy(config).save_pretrained(tmp_path / "second" / "sft" / "policy")
    return warm_policy(config, tmp_path / "second" / "sft" / "policy")


@pytest.mark.parametrize("critic", CRITICS)
def test_without_a_warm_start_the_critic_goes_on(tmp_path, critic):
    config, policy = trained(tmp_path, critic, "sft.epochs=0")
    expected = values(policy)
    assert expected.std() > 1e-4
    torch.testing.assert_close(values(begin(config, tmp_path)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("critic", ["separate", "adapter"])
def test_after_a_warm_start_trunk_and_head_begin_anew(tmp_path, critic, caplog):
    config, _ = trained(tmp_path, critic, "sft.epochs=1")
    policy = begin(config, tmp_path)
    assert values(policy).abs().max() == 0
    assert "the critic begins anew, trunk and head" in caplog.text
    # The trunk is the actor's: a head on it says what the actor's own hidden state would make it say.
    with torch.no_grad():
        policy.value_head.fc2.weight.normal_()
        own = values(policy)
        policy.config = policy.config.model_copy(update={"critic": "shared"})
        torch.testing.assert_close(values(policy), own, rtol=1e-5, atol=1e-6)
    again = begin(config, tmp_path)
    assert torch.equal(again.value_head.fc1.weight, policy.value_head.fc1.weight)  # seeded


def test_an_untrained_critic_begins_without_a_word(tmp_path, caplog):
    config = toy_config("policy.critic=separate")
    assert values(begin(config, tmp_path)).abs().max() == 0
    assert "anew" not in caplog.text
