"""Group advantages and the clipped objective of answers of different lengths, as TorchRL computes them.

The figures were written by `record_torchrl.py`; they hold TorchRL's version.
"""

import json
from pathlib import Path

import numpy as np
import torch

from reachrl.functional.groups import group_advantages
from reachrl.functional.ppo import policy_loss

RECORD = json.loads((Path(__file__).parent / "data" / "torchrl_grpo.json").read_text())


def test_group_advantages_are_torchrls():
    returns = np.array(RECORD["returns"])
    groups = np.arange(len(returns)) // RECORD["group_size"]
    found = group_advantages(returns, groups, baseline="mean", divide_by_std=True)
    # Deviations below 1e-6 apart: 1e-6 is added to them here, and is their least there.
    np.testing.assert_allclose(found, RECORD["group_advantages"], rtol=0, atol=3e-6)


def test_loss_and_gradient_of_answers_of_different_lengths_are_torchrls():
    """TorchRL's `prompt_mean`: the mean over an answer's tokens before that over answers."""
    new, old, advantages = (
        torch.tensor(RECORD[name], dtype=torch.float64) for name in ("logprobs", "old_logprobs", "advantages")
    )
    mask = torch.tensor(RECORD["mask"])
    assert (~mask).sum() > 0 and len(mask.sum(1).unique()) == 5
    low, high = RECORD["clip"]
    new.requires_grad_()
    rows, stats = policy_loss(new, old, advantages, mask, clip_eps_low=low, clip_eps_high=high, ratio_level="token")
    loss = rows.mean()
    loss.backward()
    assert 0 < stats["clip_frac"] < 1
    np.testing.assert_allclose(loss.item(), RECORD["loss"], rtol=1e-6)
    assert new.grad is not None
    np.testing.assert_allclose(new.grad.numpy(), RECORD["gradient"], rtol=1e-6, atol=1e-12)
