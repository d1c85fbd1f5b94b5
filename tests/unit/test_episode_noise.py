"""Noise by position is that of the whole block drawn at once, whoever asks for how much of it."""

import numpy as np
import pytest
import torch

from reachrl.errors import ExtensionError
from reachrl.rollout.acting import EpisodeNoise
from reachrl.streams import Stream, generator
from reachrl.testing.conformance_policy import check_policy
from reachrl.testing.policies import TablePolicy, TablePolicyConfig
from reachrl.types import Observation


def streams(*episodes):
    return [None if number is None else generator(3, Stream.ROLLOUT_NOISE, number, 5) for number in episodes]


def test_positions_are_rows_of_the_block_drawn_at_once():
    """To the last bit: published figures rest on these numbers."""
    policy = TablePolicy(TablePolicyConfig(num_action_tokens=7))
    blocks = [each.gumbel(size=(7, 256)).astype(np.float32) for each in streams(4, 9)]
    noise = EpisodeNoise(policy, streams(4, None, 9))
    for position in range(7):
        expected = np.stack([blocks[0][position], np.zeros(256, np.float32), blocks[1][position]])
        assert np.array_equal(noise(position).numpy(), expected)
    skipping = EpisodeNoise(policy, streams(9))
    assert np.array_equal(skipping(2)[0].numpy(), blocks[1][2])
    assert np.array_equal(skipping(6)[0].numpy(), blocks[1][6])


def test_nothing_is_drawn_before_it_is_asked_for():
    policy = TablePolicy(TablePolicyConfig(num_action_tokens=200))
    policy.num_choices = 257_000
    (stream,) = streams(4)
    noise = EpisodeNoise(policy, [stream])
    assert stream.bit_generator.state == streams(4)[0].bit_generator.state
    noise(0)
    reference = streams(4)[0]
    reference.gumbel(size=257_000)
    assert stream.bit_generator.state == reference.bit_generator.state


class FromTheEnd(TablePolicy):
    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        drawn = {position: noise(position) for position in (1, 0)}
        return super().act(inputs, temperature=temperature, noise=drawn.__getitem__)


def test_a_policy_that_asks_in_another_order_is_told():
    policy = FromTheEnd(TablePolicyConfig(num_contexts=256))
    images = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(ExtensionError, match=r"FromTheEnd\.act asked for the noise of position 0 after that of 1"):
        check_policy(policy, Observation(images={"camera": images}, instructions=("do it",) * 3))


def test_samples_at_a_temperature_follow_the_generators_numbers():
    """`predict` draws position by position what it drew as one block."""
    torch.manual_seed(0)
    policy = TablePolicy(TablePolicyConfig(num_contexts=256))
    torch.nn.init.normal_(policy.logits)
    block = np.random.default_rng(7).gumbel(size=(2, 2, 256)).astype(np.float32)
    rng, logits = np.random.default_rng(7), (policy.logits[9].detach() / 1.5).numpy()
    for step in range(2):
        action = policy.predict(
            images=np.full((4, 4, 3), 9, np.uint8), instruction="do it", temperature=1.5, generator=rng
        )
        np.testing.assert_allclose(action[0], (logits + block[step]).argmax(-1) / 127.5 - 1, atol=1e-6)
