"""One decision of a policy in each row: noise, tokens, and the actions they stand for."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float32

from reachrl.errors import ExtensionError
from reachrl.policies.base import ActionSample, Policy
from reachrl.types import Observation


def decide(
    policy: Policy,
    observation: Observation,
    *,
    temperature: float,
    gumbel: Float32[torch.Tensor, "N A V"] | None,
    with_values: bool,
) -> tuple[ActionSample, Float32[np.ndarray, "N H D"]]:
    """The policy's answer in each row, in main memory, and the actions to carry out.

    Raises:
        ExtensionError: the answer breaks the contract of `ActionSample`.
    """
    inputs = policy.encode(observation)
    sample = policy.act(inputs, temperature=temperature, gumbel=gumbel, with_values=with_values)
    actions = policy.actions(sample)
    sample = ActionSample(
        token_ids=sample.token_ids.cpu(),
        token_mask=sample.token_mask.cpu(),
        logprobs=sample.logprobs.float().cpu(),
        values=None if sample.values is None else sample.values.float().cpu(),
        malformed=sample.malformed.cpu(),
    )
    check_sample(policy, sample, len(observation.instructions))
    return sample, actions


def check_sample(policy: Policy, sample: ActionSample, rows: int) -> None:
    """Refuse answers that could not be learned from.

    Raises:
        ExtensionError: what is wrong with which row.
    """
    shape, name = (rows, policy.num_action_tokens), type(policy).__name__
    if tuple(sample.token_ids.shape) != shape or tuple(sample.token_mask.shape) != shape:
        raise ExtensionError(
            f"{name}.act answered token_ids {list(sample.token_ids.shape)} and token_mask "
            f"{list(sample.token_mask.shape)}, expected {list(shape)} both: a row an observation, `num_action_tokens` "
            "slots in each. Fill the slots behind a short answer with id 0, and leave them out of the mask"
        )
    empty = ~sample.token_mask.any(-1)
    if empty.any():
        raise ExtensionError(
            f"{name}.act answered row {int(empty.nonzero()[0])} without any token, so there is nothing to learn from: "
            "the mask must hold the tokens that were chosen, the one that ends the answer included"
        )
    outside = ~sample.token_mask & ((sample.token_ids != 0) | (sample.logprobs != 0))
    if outside.any():
        row, slot = outside.nonzero()[0].tolist()
        raise ExtensionError(
            f"{name}.act answered token {int(sample.token_ids[row, slot])} with log-prob "
            f"{float(sample.logprobs[row, slot]):g} at row {row}, slot {slot}, outside the mask; expected 0 and 0 there"
        )


def gumbel_noise(policy: Policy, generators: Iterable[np.random.Generator | None]) -> Float32[torch.Tensor, "B A V"]:
    """Standard Gumbel noise for `policy.act`, on its device; zeros for rows without a generator.

    Source: argmax(logits + Gumbel noise) samples the softmax (Gumbel 1954; Maddison et al. 2014).
    """
    shape = (policy.num_action_tokens, policy.num_choices)
    rows = [np.zeros(shape) if each is None else each.gumbel(size=shape) for each in generators]
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(policy.device)
