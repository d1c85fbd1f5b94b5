"""Recorded decoding is decoding: on fixed memory, for any batch, with the weights of the day."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_policy import adapted, inputs
from torch.fx.experimental.proxy_tensor import make_fx

from reachrl.config.policy import recorded_rows
from reachrl.policies.base import ActionSample
from reachrl.policies.decoding.recordings import Recordings
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.testing.policies import given_noise

Tensors = tuple[torch.Tensor, torch.Tensor]


class Traces:
    """Records the operations and the memory they work on, but no Python, as CUDA graphs do."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Callable[[], Tensors]) -> Callable[[], Tensors]:
        self.count += 1
        trace = make_fx(work)()
        return lambda: trace()


def rows(policy: OpenVLAPolicy, *index: int) -> OpenVLAInputs:
    return inputs(policy).rows(torch.tensor(index))


def noise(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, 256, generator=torch.Generator().manual_seed(seed))


def recorded(base: Path, **changes: object) -> tuple[OpenVLAPolicy, Traces]:
    policy = adapted(base, rollout_copy=True, **changes)
    policy.act(rows(policy, 0))  # forms the copy
    traces = Traces()
    assert policy._rollout is not None
    policy._rollout.recordings = Recordings(traces)
    return policy, traces


def assert_equal(ours: ActionSample, theirs: ActionSample) -> None:
    assert torch.equal(ours.token_ids, theirs.token_ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=0)


def test_every_batch_is_decoded_as_without_recordings(base: Path) -> None:
    """Larger and smaller ones, one after the other in the same cache; padded prompts, noise and temperatures."""
    (policy, traces), plain = recorded(base), adapted(base, rollout_copy=True)
    for index, temperature in (
        *(((0, 1, 2), 1.0), ((2, 1, 0), 1.0), ((2, 1, 0), 0.7), ((2, 1), 1.0), ((0, 1, 2, 0, 1), 1.0)),
        *(((1, 2, 0, 1, 1, 2, 0), 1.0), ((0, 1, 2), 1.0), ((2,), 1.0)),
    ):
        for gumbel in (None, noise(len(index)), noise(len(index), seed=1)):
            asked = {"noise": None if gumbel is None else given_noise(gumbel), "temperature": temperature}
            assert_equal(policy.act(rows(policy, *index), **asked), plain.act(rows(plain, *index), **asked))
    assert traces.count == 6  # 4 rows; another temperature; 2; 8, which moved the cache; 4 again; 1


def test_one_size_is_recorded_once(base: Path) -> None:
    policy, traces = recorded(base)
    policy.act(rows(policy, *[0, 1, 2] * 5))  # 16
    counts = []
    for batch in (3, 4, 3, 2, 16, 15):
        policy.act(rows(policy, *[0] + [1] * (batch - 1)), noise=given_noise(noise(batch)))
        counts.append(traces.count)
    assert counts == [2, 2, 2, 3, 3, 3]
    policy.act(rows(policy, *[0, 1] * 10))  # the cache moves: everything anew
    policy.act(rows(policy, 0, 1, 1), noise=given_noise(noise(3)))
    assert traces.count == 5


def test_the_next_replay_does_not_touch_what_was_given(base: Path) -> None:
    policy, _ = recorded(base)
    first = policy.act(rows(policy, 0, 1, 2), noise=given_noise(noise(3)))
    kept = first.token_ids.clone(), first.logprobs.clone()
    policy.act(rows(policy, 2, 0, 1), noise=given_noise(noise(3, seed=1)))
    assert torch.equal(first.token_ids, kept[0]) and torch.equal(first.logprobs, kept[1])


def test_replays_use_the_newest_weights(base: Path) -> None:
    policy, traces = recorded(base)
    before = policy.act(inputs(policy), noise=given_noise(noise(3)))
    with torch.no_grad():
        for parameter in policy.parameter_groups()["trunk"]:
            parameter.mul_(1.3)
    sample = policy.act(inputs(policy), noise=given_noise(noise(3)))
    scored = policy.evaluate(inputs(policy), sample.token_ids).logprobs
    assert traces.count == 1 and not torch.allclose(before.logprobs, sample.logprobs, atol=1e-3)
    torch.testing.assert_close(sample.logprobs, scored, atol=1e-5, rtol=0)


def test_moved_weights_end_the_recordings(base: Path) -> None:
    policy, _ = recorded(base)
    policy.act(inputs(policy))
    policy.to(torch.float64)
    assert policy._rollout is None


def test_sizes() -> None:
    assert [recorded_rows(batch) for batch in (1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128)] == [
        *(1, 2, 4, 8, 8, 16, 16, 32, 32, 48, 64, 80, 128)
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_decode_as_without_them(base: Path) -> None:
    plain, policy = (adapted(base, rollout_copy=True, decode_graphs=graphs).to("cuda") for graphs in (False, True))
    for index in ((0,), (0, 1, 2), (2, 1, 0), (0, 1, 2, 0, 1)):
        for gumbel in (None, noise(len(index)).cuda()):
            samples = [
                each.act(rows(each, *index), noise=None if gumbel is None else given_noise(gumbel))
                for each in (policy, plain)
            ]
            assert torch.equal(samples[0].token_ids, samples[1].token_ids)
            torch.testing.assert_close(samples[0].logprobs, samples[1].logprobs, atol=1e-4, rtol=0)
    assert policy._rollout is not None and plain._rollout is not None
    assert policy._rollout.recordings is not None and plain._rollout.recordings is None
