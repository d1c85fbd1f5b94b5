"""Steps that are rounded away: refused where they would be, and seen where they are."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from small_policy import adapted, inputs, small
from torch import nn

from reachrl.algorithms.base import Batch
from reachrl.algorithms.ppo import PPO
from reachrl.config.demos import SFTSection
from reachrl.config.loading import load_config
from reachrl.config.ppo import PPOConfig
from reachrl.config.protocols import evaluation_config
from reachrl.config.train import refuse_training
from reachrl.demos.sft import _optimizer as sft_optimizer
from reachrl.errors import ConfigError
from reachrl.fitting import adamw
from reachrl.iteration_record import warn_of_lost_steps
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.run.weight_change import ALARM, WeightSample


def step(parameters: list[nn.Parameter], lr: float, *, steps: int = 3) -> tuple[float, list[torch.Tensor]]:
    """The figure of the last of some steps, and which elements it changed."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    sample, before = WeightSample(parameters), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim == 2:
                parameter.grad[0] = 0  # the embedding of a word that never occurs
        before = [parameter.detach().clone() for parameter in parameters]
        sample.remember()
        optimizer.step()
    return sample.changed(optimizer), [p.detach() != old for p, old in zip(parameters, before, strict=True)]


def test_the_share_is_that_of_all_weights_that_had_a_gradient() -> None:
    torch.manual_seed(1)
    # Held in 16 bits a step of 2e-5 reaches only the smallest weights; of 16 x 16 elements all are looked at.
    coarse = nn.Parameter((0.002 * torch.randn(16, 16)).bfloat16())
    fine = nn.Parameter(torch.randn(200))
    share, changed = step([coarse, fine], lr=2e-5)
    assert not changed[0][0].any() and changed[1].all() and 10 < changed[0].sum() < 230
    assert share == pytest.approx((changed[0].sum().item() + 200) / (15 * 16 + 200), abs=1e-12)
    assert step([nn.Parameter(0.02 * torch.randn(64, 300))], lr=2e-5)[0] == 1.0
    large = nn.Parameter((0.02 * torch.randn(64, 300)).bfloat16())
    share, [moved] = step([large], lr=2e-5)
    assert share == pytest.approx(moved.sum().item() / (63 * 300), abs=0.06) and share < 0.2 < ALARM


def test_where_nothing_was_to_change_nothing_is_said() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    assert math.isnan(WeightSample([parameter]).changed(optimizer))
    assert math.isnan(WeightSample([]).changed(optimizer))


def batch(policy: OpenVLAPolicy) -> Batch:
    rows = inputs(policy)
    ids = torch.arange(12).view(3, 4) + policy.first_action_id
    with torch.no_grad():
        out = policy.evaluate(rows, ids)
    numbers = torch.tensor([1.0, -1.0, 0.5])
    return Batch(
        rows=torch.arange(3),
        inputs=rows.rows,
        token_ids=ids,
        token_mask=torch.ones_like(ids, dtype=torch.bool),
        malformed=torch.zeros(3, dtype=torch.bool),
        behaviour_logprobs=out.logprobs,
        old_logprobs=out.logprobs,
        old_values=out.values,
        advantages=numbers,
        returns=out.values + numbers,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_an_update_says_how_many_weights_its_last_step_changed(base, lora: bool) -> None:
    """Against every single weight: those with a gradient, and those that differ afterwards."""
    policy = adapted(base) if lora else OpenVLAPolicy.from_pretrained(base)
    algorithm = PPO(PPOConfig(epochs=1, target_kl=None, weight_decay=0.0), policy, seed=0, temperature=1.0)
    groups = policy.parameter_groups()
    for role, name in (("trunk", "changed_weights"), ("value", "value_changed_weights")):
        old = [parameter.detach().clone() for parameter in groups[role]]
        algorithm.warming_up = False
        stats = algorithm.update(batch(policy), iteration=50)
        means = [algorithm.optimizer.state[parameter]["exp_avg"] for parameter in groups[role]]
        due = sum((mean != 0).sum().item() for mean in means)
        moved = sum(
            ((parameter != before) & (mean != 0)).sum().item()
            for parameter, before, mean in zip(groups[role], old, means, strict=True)
        )
        assert stats[name] == pytest.approx(moved / due, abs=0.02) and moved / due > 0.97
    algorithm.warming_up = True
    still = algorithm.update(batch(policy), iteration=51)
    assert math.isnan(still["changed_weights"]) and still["value_changed_weights"] > 0.97


def test_the_alarm_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    state = SimpleNamespace(iteration=7)
    with caplog.at_level(logging.WARNING):
        for share, said in ((math.nan, 0), (0.99, 0), (0.04, 1)):
            caplog.clear()
            shares = {"changed_weights": share, "value_changed_weights": 1.0}
            warn_of_lost_steps(state, shares)
            assert len(caplog.records) == said
    assert "iteration 7: the last step changed 4 % of the policy's weights" in caplog.text


def test_weights_in_16_bits_are_not_trained_by_anyone(base) -> None:
    for critic in ("shared", "separate"):
        policy = OpenVLAPolicy(small(dtype="bfloat16", critic=critic))
        for make in (lambda p: PPO(PPOConfig(), p, seed=0, temperature=1.0), lambda p: sft_optimizer(p, SFTSection())):
            with pytest.raises(ConfigError, match=r"held in bfloat16, .* policy\.compute_dtype=bfloat16"):
                make(policy)
    small_model = SmallRewardModel(image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=["reach"])
    with pytest.raises(ConfigError, match="held in bfloat16"):
        adamw(list(small_model.bfloat16().parameters()), lr=1e-3, weight_decay=0.0, model="SmallRewardModel")
    for changes in ({"dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}):  # adapters are float32 on any base
        PPO(
            PPOConfig(train_vision=True),
            adapted(base, lora={"parts": ["vision", "projector"]}, **changes),
            seed=0,
            temperature=1.0,
        )
    PPO(PPOConfig(train_vision=True), OpenVLAPolicy(small(compute_dtype="bfloat16")), seed=0, temperature=1.0)


def test_the_configuration_tells_before_anything_is_collected(command_line, tmp_path) -> None:
    for command in ("train", "demos", "sft", "plan"):
        options = [] if command == "plan" else ["--run", tmp_path / "run"]
        code, _, err = command_line(command, "toy", "policy.dtype=bfloat16", *options)
        assert code == 2 and "policy.compute_dtype=bfloat16" in " ".join(err.split())
    assert not (tmp_path / "run").exists()
    for changes in (["policy.compute_dtype=bfloat16"], []):
        refuse_training(load_config("toy", changes))
    refuse_training(load_config("libero_spatial"))
    coarse = evaluation_config("toy", ["policy.dtype=bfloat16"], suite=None, protocol="heldout", cores=1)
    assert coarse.policy.dtype == "bfloat16"  # evaluating is fine
