"""Sampling noise for the rows of a batch, each from its own stream."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float32

from reachrl.policies.base import Policy


def gumbel_noise(policy: Policy, generators: Iterable[np.random.Generator | None]) -> Float32[torch.Tensor, "B A V"]:
    """Standard Gumbel noise for `policy.act`, on its device; zeros for rows without a generator.

    Source: argmax(logits + Gumbel noise) samples the softmax (Gumbel 1954; Maddison et al. 2014).
    """
    shape = (policy.num_action_tokens, policy.num_choices)
    rows = [np.zeros(shape) if each is None else each.gumbel(size=shape) for each in generators]
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(policy.device)
