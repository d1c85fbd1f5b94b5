"""Checks that a policy keeps the contract of `reachrl.policies.base.Policy`, for plug-in authors.

from reachrl.testing.conformance_policy import check_policy
check_policy(my_policy, observation)
"""

from collections.abc import Callable

import numpy as np
import torch

from reachrl.errors import ExtensionError
from reachrl.policies.base import ActionSample, Noise, Policy, PolicyInputs
from reachrl.rollout.acting import EpisodeNoise, check_sample
from reachrl.types import Observation

_TOLERANCE = 1e-4  # between a decoder with a cache and one teacher-forced pass, in float32


def check_policy(policy: Policy, observation: Observation, *, temperature: float = 1.3) -> None:
    """Try a policy out on real observations.

    Args:
        policy: any weights; it is left as it was.
        observation: N >= 2 rows, with different frames.
        temperature: of sampling and scoring.

    Raises:
        ExtensionError: the first promise that is broken, and how to keep it.
    """
    rows = len(observation)
    inputs = policy.encode(observation)

    def noise(row: int | None = None) -> EpisodeNoise:
        numbers = range(rows) if row is None else [row]
        return EpisodeNoise(policy, (np.random.default_rng([0, number]) for number in numbers))

    sample = policy.act(inputs, temperature=temperature, noise=noise())
    without = policy.act(inputs, temperature=temperature, noise=noise(), with_values=False)
    _same(without.logprobs, sample.logprobs, "act's log-probs depend on with_values")
    check_sample(policy, sample, rows)
    _check_scores(policy, inputs, sample, temperature)
    _check_mask(policy, inputs, sample, temperature)
    _check_rows_alone(policy, inputs, sample, noise, temperature)
    _check_cached_vision(policy, inputs, sample, temperature)
    _check_batches(policy, inputs, sample, temperature)
    _check_actions(policy, sample)
    _check_groups(policy)
    if policy.has_mean:
        _check_mean(policy, inputs)


def _check_mean(policy: Policy, inputs: PolicyInputs) -> None:
    """The mean of a distribution that has shrunk to one token is that token."""
    cold, greedy = policy.act(inputs, temperature=1e-6, mean=True), policy.act(inputs)
    if not torch.equal(cold.token_ids, greedy.token_ids):
        raise ExtensionError(
            "act with mean=True does not come to the likeliest tokens as the temperature goes to 0: take the token "
            "nearest to the mean of softmax(logits / temperature) over the tokens' numbers, or leave has_mean false."
        )


@torch.no_grad()
def _check_scores(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    scored = policy.evaluate(inputs, sample.token_ids, sample.token_mask, temperature=temperature)
    problem = "act's log-probs are not those evaluate gives the same tokens"
    _same(sample.logprobs, scored.logprobs, problem, sample.token_mask)
    if sample.values is None or scored.values is None:
        raise ExtensionError("act and evaluate return values unless with_values is false.")
    _same(sample.values, scored.values, "act's values are not evaluate's")
    _same(sample.values, policy.values(inputs), "act's values are not those of values()")
    entropy = scored.entropy[sample.token_mask]
    if not (entropy > -_TOLERANCE).all() or not (entropy < np.log(policy.num_choices) + _TOLERANCE).all():
        raise ExtensionError("evaluate's entropy lies outside [0, ln num_choices]: it is that of a choice among those.")


@torch.no_grad()
def _check_mask(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    """What stands outside the mask is not read."""
    mask = sample.token_mask
    other = sample.token_ids.where(mask, sample.token_ids[mask][0])
    expected = policy.evaluate(inputs, sample.token_ids, mask, temperature=temperature)
    scored = policy.evaluate(inputs, other, mask, temperature=temperature)
    problem = "evaluate's {} depend on what stands outside the mask"
    _same(expected.logprobs, scored.logprobs, problem.format("log-probs"), mask)
    _same(expected.entropy, scored.entropy, problem.format("entropies"), mask)
    if expected.values is not None and scored.values is not None:
        _same(expected.values, scored.values, problem.format("values"))


@torch.no_grad()
def _check_rows_alone(
    policy: Policy, inputs: PolicyInputs, sample: ActionSample, noise: Callable[[int], Noise], temperature: float
) -> None:
    for row in range(len(sample.token_ids)):
        index = torch.tensor([row], device=policy.device)
        alone = policy.act(inputs.rows(index), temperature=temperature, noise=noise(row))
        same_mask = torch.equal(alone.token_mask, sample.token_mask[index])
        if not (same_mask and torch.equal(alone.token_ids, sample.token_ids[index])):
            raise ExtensionError(f"row {row} decodes to other tokens alone than in its batch; rows must not interact.")
        _same(alone.logprobs, sample.logprobs[index], "a row's log-probs depend on its batch")


@torch.no_grad()
def _check_cached_vision(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    scored = policy.evaluate(policy.cache(inputs), sample.token_ids, sample.token_mask, temperature=temperature)
    problem = "log-probs from cached rows differ from those from the rows of encode"
    _same(sample.logprobs, scored.logprobs, problem, sample.token_mask)


@torch.no_grad()
def _check_batches(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    """Rows survive being taken apart, put together and moved, before and after `cache`."""
    count = len(sample.token_ids)
    if len(inputs) != count:
        raise ExtensionError(f"encode's rows say they are {len(inputs)}; {count} were observed.")
    backwards = torch.arange(count - 1, -1, -1)
    tokens = sample.token_ids[backwards], sample.token_mask[backwards]
    expected = policy.evaluate(inputs, sample.token_ids, sample.token_mask, temperature=temperature).logprobs[backwards]
    for each, of in ((inputs, "encode"), (policy.cache(inputs), "cache")):
        parts = [each.rows(index) for index in backwards.split(max(1, count // 2))]
        together = type(each).concat([part.to("cpu").to(policy.device) for part in parts])
        scored = policy.evaluate(together, *tokens, temperature=temperature)
        problem = f"rows of {of} taken with `rows` and joined with `concat` get other log-probs"
        _same(expected, scored.logprobs, problem, tokens[1])


def _check_actions(policy: Policy, sample: ActionSample) -> None:
    actions, wanted = policy.actions(sample), (len(sample.token_ids), policy.num_actions, policy.action_dim)
    if actions.shape != wanted or actions.dtype != np.float32 or not np.isfinite(actions).all():
        raise ExtensionError(
            f"decode_actions gives {actions.dtype} {list(actions.shape)}; expected finite float32 {list(wanted)}: "
            "rows, num_actions, action_dim."
        )
    known = ~sample.malformed.cpu().numpy()
    if not known.any():
        return
    again = policy.decode_actions(*policy.encode_actions(actions[known]))
    if not np.allclose(actions[known], again, atol=1e-5):
        raise ExtensionError("decode_actions(encode_actions(a)) is not a for an action that a token stands for.")


def _check_groups(policy: Policy) -> None:
    groups = policy.parameter_groups()
    if set(groups) != {"vision", "trunk", "value"}:
        raise ExtensionError(f"parameter_groups needs the roles vision, trunk and value; got {sorted(groups)}.")
    held = [id(parameter) for group in groups.values() for parameter in group]
    if sorted(held) != sorted(id(parameter) for parameter in policy.parameters() if parameter.requires_grad):
        raise ExtensionError("parameter_groups must hold every parameter that can be trained exactly once.")


def _same(ours: torch.Tensor, theirs: torch.Tensor, problem: str, mask: torch.Tensor | None = None) -> None:
    gaps = (ours - theirs).abs()
    gap = (gaps if mask is None else gaps[mask]).max().item()
    if not gap < _TOLERANCE:
        raise ExtensionError(f"{problem} (largest difference {gap:.2g}).")
