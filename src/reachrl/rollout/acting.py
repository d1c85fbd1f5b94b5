"""One decision of a policy in each row: noise, tokens and decoded actions."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float32

from reachrl.envs.batch import EnvBatch
from reachrl.errors import ConfigError, ExtensionError
from reachrl.policies.base import ActionSample, Noise, Policy, PolicyInputs


def answer(
    policy: Policy,
    inputs: PolicyInputs,
    *,
    temperature: float,
    noise: Noise | None,
    with_values: bool,
    mean: bool = False,
) -> tuple[ActionSample, Float32[np.ndarray, "N H D"]]:
    """The policy's answer in each row, in main memory, and the actions to carry out.

    Raises:
        ExtensionError: the answer breaks the contract of `ActionSample`.
    """
    asked = {"mean": True} if mean else {}  # of those alone that have one
    sample = policy.act(inputs, temperature=temperature, noise=noise, with_values=with_values, **asked)
    actions = policy.actions(sample)
    sample = ActionSample(
        token_ids=sample.token_ids.cpu(),
        token_mask=sample.token_mask.cpu(),
        logprobs=sample.logprobs.float().cpu(),
        values=None if sample.values is None else sample.values.float().cpu(),
        malformed=sample.malformed.cpu(),
    )
    check_sample(policy, sample, len(inputs))
    return sample, actions


def actions_executed(policy: Policy, envs: EnvBatch) -> int:
    """How many actions of each answer are carried out: `env.execute`, or all of them.

    Raises:
        ConfigError: the policy answers with fewer, or takes cameras or a state that the environments do not show.
    """
    policy.check_shown(envs.shown.cameras, envs.shown.state_size)
    if envs.execute is not None and envs.execute > policy.num_actions:
        raise ConfigError(
            f"env.execute={envs.execute} actions are to be carried out of the {policy.num_actions} that "
            f"{type(policy).__name__} answers with: lower env.execute to {policy.num_actions} at most, or leave it out"
        )
    return envs.execute or policy.num_actions


def check_sample(policy: Policy, sample: ActionSample, rows: int) -> None:
    """Check a sample against the contract of `ActionSample`.

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


class EpisodeNoise:
    """Standard Gumbel noise for `policy.act`, on its device: each row's from its own generator, drawn when asked for.

    A position's noise is what its generator gives after that of the positions before, asked for or not.

    Args:
        policy: what is to act.
        generators: one for each row; a row without one gets zeros.

    Source: argmax(logits + Gumbel noise) samples the softmax (Gumbel 1954; Maddison et al. 2014).
    """

    def __init__(self, policy: Policy, generators: Iterable[np.random.Generator | None]) -> None:
        self._policy, self._generators, self._next = policy, list(generators), 0

    def __call__(self, position: int) -> Float32[torch.Tensor, "B V"]:
        """The noise of a position.

        Raises:
            ExtensionError: it, or one behind it, was asked for before.
        """
        if position < self._next:
            raise ExtensionError(
                f"{type(self._policy).__name__}.act asked for the noise of position {position} after that of "
                f"{self._next - 1}: ask for each position once, in ascending order"
            )
        skipped, self._next = position - self._next, position + 1
        return torch.from_numpy(np.stack([self._row(each, skipped) for each in self._generators])).to(
            self._policy.device
        )

    def _row(self, generator: np.random.Generator | None, skipped: int) -> Float32[np.ndarray, "V"]:
        count = self._policy.num_choices
        if generator is None:
            return np.zeros(count, np.float32)
        for _ in range(skipped):
            generator.gumbel(size=count)
        return generator.gumbel(size=count).astype(np.float32)
