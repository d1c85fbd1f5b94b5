"""Checks that a policy keeps the contract of `reachrl.policies.base.Policy`, for plug-in authors.

from reachrl.testing.conformance_policy import check_policy
check_policy(my_policy, observation)
"""

import numpy as np
import torch

from reachrl.errors import ExtensionError
from reachrl.policies.base import ActionSample, Policy, PolicyInputs
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
    noise = np.random.default_rng(0).gumbel(size=(rows, policy.num_action_tokens, policy.num_choices))
    gumbel = torch.from_numpy(noise.astype(np.float32)).to(policy.device)
    sample = policy.act(inputs, temperature=temperature, gumbel=gumbel)
    without = policy.act(inputs, temperature=temperature, gumbel=gumbel, with_values=False)
    _same(without.logprobs, sample.logprobs, "act's log-probs depend on with_values")
    _check_scores(policy, inputs, sample, temperature)
    _check_rows_alone(policy, inputs, sample, gumbel, temperature)
    _check_cached_vision(policy, inputs, sample, temperature)
    _check_batches(policy, inputs, sample, temperature)
    _check_actions(policy, sample)
    _check_groups(policy)


@torch.no_grad()
def _check_scores(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    scored = policy.evaluate(inputs, sample.token_ids, temperature=temperature)
    _same(sample.logprobs, scored.logprobs, "act's log-probs are not those evaluate gives the same actions")
    if sample.values is None or scored.values is None:
        raise ExtensionError("act and evaluate return values unless with_values is false.")
    _same(sample.values, scored.values, "act's values are not evaluate's")
    _same(sample.values, policy.values(inputs), "act's values are not those of values()")
    if not (scored.entropy > -_TOLERANCE).all() or not (scored.entropy < np.log(policy.num_choices) + _TOLERANCE).all():
        raise ExtensionError("evaluate's entropy lies outside [0, ln num_choices]: it is that of a choice among those.")


@torch.no_grad()
def _check_rows_alone(
    policy: Policy, inputs: PolicyInputs, sample: ActionSample, gumbel: torch.Tensor, temperature: float
) -> None:
    for row in range(len(sample.token_ids)):
        index = torch.tensor([row], device=policy.device)
        alone = policy.act(inputs.rows(index), temperature=temperature, gumbel=gumbel[index])
        if not torch.equal(alone.token_ids, sample.token_ids[index]):
            raise ExtensionError(f"row {row} decodes to other tokens alone than in its batch; rows must not interact.")
        _same(alone.logprobs, sample.logprobs[index], "a row's log-probs depend on its batch")


@torch.no_grad()
def _check_cached_vision(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    scored = policy.evaluate(policy.cache(inputs), sample.token_ids, temperature=temperature)
    _same(sample.logprobs, scored.logprobs, "log-probs from cached rows differ from those from the rows of encode")


@torch.no_grad()
def _check_batches(policy: Policy, inputs: PolicyInputs, sample: ActionSample, temperature: float) -> None:
    """Rows survive being taken apart, put together and moved, before and after `cache`."""
    count = len(sample.token_ids)
    if len(inputs) != count:
        raise ExtensionError(f"encode's rows say they are {len(inputs)}; {count} were observed.")
    backwards = torch.arange(count - 1, -1, -1)
    expected = policy.evaluate(inputs, sample.token_ids, temperature=temperature).logprobs[backwards]
    for each, of in ((inputs, "encode"), (policy.cache(inputs), "cache")):
        parts = [each.rows(index) for index in backwards.split(max(1, count // 2))]
        together = type(each).concat([part.to("cpu").to(policy.device) for part in parts])
        scored = policy.evaluate(together, sample.token_ids[backwards], temperature=temperature)
        _same(expected, scored.logprobs, f"rows of {of} taken with `rows` and joined with `concat` get other log-probs")


def _check_actions(policy: Policy, sample: ActionSample) -> None:
    actions = policy.decode_actions(sample.token_ids)
    again = policy.decode_actions(policy.encode_actions(actions))
    if not np.allclose(actions, again, atol=1e-5):
        raise ExtensionError("decode_actions(encode_actions(a)) is not a for an action that a token stands for.")


def _check_groups(policy: Policy) -> None:
    groups = policy.parameter_groups()
    if set(groups) != {"vision", "trunk", "value"}:
        raise ExtensionError(f"parameter_groups needs the roles vision, trunk and value; got {sorted(groups)}.")
    held = [id(parameter) for group in groups.values() for parameter in group]
    if sorted(held) != sorted(id(parameter) for parameter in policy.parameters() if parameter.requires_grad):
        raise ExtensionError("parameter_groups must hold every parameter that can be trained exactly once.")


def _same(ours: torch.Tensor, theirs: torch.Tensor, problem: str) -> None:
    gap = (ours - theirs).abs().max().item()
    if not gap < _TOLERANCE:
        raise ExtensionError(f"{problem} (largest difference {gap:.2g}).")
