"""Action tokens over arbitrary actions and statistics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reachrl.functional.action_stats import ActionStats
from reachrl.policies.action_tokens import tokens_from_unit, unit_from_tokens

unit = st.floats(-1, 1, allow_nan=False)
vocab_ends = st.sampled_from([1024, 32000])


@given(unit, vocab_ends)
def test_a_decoded_action_is_half_a_bin_away_at_most(action: float, vocab_end: int) -> None:
    token = tokens_from_unit(np.array([action]), vocab_end)
    assert vocab_end - 256 <= token[0] <= vocab_end - 1
    assert abs(unit_from_tokens(token, vocab_end)[0] - action) <= 1 / 255 + 1e-12


@given(unit, unit, vocab_ends)
def test_larger_actions_have_smaller_ids(a: float, b: float, vocab_end: int) -> None:
    small, large = sorted((a, b))
    tokens = tokens_from_unit(np.array([small, large]), vocab_end)
    assert tokens[0] >= tokens[1]


@given(st.integers(0, 255), vocab_ends)
def test_decoding_then_encoding_is_stable(row: int, vocab_end: int) -> None:
    token = np.array([vocab_end - 256 + row])
    again = tokens_from_unit(unit_from_tokens(token, vocab_end), vocab_end)
    assert again[0] == max(token[0], vocab_end - 255)  # the two lowest ids share a centre


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 10), st.booleans(), unit), min_size=1, max_size=7))
def test_normalising_inverts_unnormalising(rows: list[tuple[float, float, bool, float]]) -> None:
    low, span, mask, action = (np.array(column) for column in zip(*rows, strict=True))
    stats = ActionStats.create(low, low + span, mask)
    physical = stats.unnormalise(action)
    assert np.array_equal(physical[~mask], action[~mask])
    assert (physical[mask] >= low[mask] - 1e-9).all() and (physical[mask] <= (low + span)[mask] + 1e-9).all()
    np.testing.assert_allclose(stats.normalise(physical), action, atol=1e-9)


def coded(actions: np.ndarray, vocab_end: int = 32000) -> np.ndarray:
    """Actions after encoding and decoding with their own statistics."""
    stats = ActionStats.of_actions(actions)
    return stats.unnormalise(unit_from_tokens(tokens_from_unit(stats.normalise(actions), vocab_end), vocab_end))


@given(st.floats(-1e4, 1e4), st.integers(1, 60), st.integers(0, 255))
def test_a_constant_comes_back_exactly_whatever_the_token(value: float, count: int, row: int) -> None:
    actions = np.full((count, 1), value)
    assert np.array_equal(coded(actions), actions)
    any_token = unit_from_tokens(np.array([32000 - 256 + row]), 32000)
    assert ActionStats.of_actions(actions).unnormalise(any_token).tolist() == [value]


@given(st.floats(-100, 100), st.floats(1e-4, 100), st.integers(200, 400), st.booleans())
def test_a_dimension_that_rarely_moves_keeps_its_range(rest: float, jump: float, count: int, down: bool) -> None:
    actions = np.full((count, 1), rest)
    actions[count // 2] += -jump if down else jump  # once in 200 steps and more: both quantiles are `rest`
    span = float(np.ptp(actions))
    assert np.abs(coded(actions) - actions).max() <= span / 255 / 2 + 1e-9


@given(st.lists(st.tuples(*[st.floats(-5, 5, width=32)] * 3), min_size=1, max_size=80))
def test_actions_between_the_quantiles_come_back_within_half_a_bin(rows: list[tuple[float, float, float]]) -> None:
    actions = np.array(rows)
    stats = ActionStats.of_actions(actions)
    expected = np.clip(actions, stats.q01, stats.q99)
    assert (np.abs(coded(actions) - expected) <= (stats.q99 - stats.q01) / 255 / 2 + 1e-9).all()
    assert stats.mask.all()


def test_statistics_by_hand() -> None:
    """101 values 0..100: the quantiles are 1 and 99; a gripper that is 1 but once has neither, so its range stands."""
    gripper = np.where(np.arange(101) == 50, -1.0, 1.0)
    stats = ActionStats.of_actions(np.stack([np.arange(101.0), gripper, np.full(101, 1.57)], 1))
    assert stats.q01.tolist() == [1.0, -1.0, 1.57] and stats.q99.tolist() == [99.0, 1.0, 1.57]
    assert stats.mask.tolist() == [True, True, True]


def test_a_dimension_that_never_moves_stays_put() -> None:
    stats = ActionStats.create(np.array([0.3, -1]), np.array([0.3, 1]), np.array([True, True]))
    assert stats.normalise(np.array([0.3, 0.5])).tolist() == [0.0, 0.5]
    assert stats.unnormalise(np.array([0.7, 0.5])).tolist() == [0.3, 0.5]


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        ActionStats.create(np.zeros(2), np.zeros(3), np.ones(2, bool))
    with pytest.raises(ValueError, match="finite"):
        ActionStats.create(np.array([np.nan]), np.ones(1), np.ones(1, bool))
    with pytest.raises(ValueError, match="q01 0.5 of dimension 1 is above its q99 0.25"):
        ActionStats.create(np.array([0, 0.5]), np.array([1, 0.25]), np.ones(2, bool))
    with pytest.raises(ValueError, match="action 3 is nan in dimension 1"):
        ActionStats.of_actions(np.array([[0, 0], [1, 1], [2, 2], [3, np.nan]]))
    with pytest.raises(ValueError, match="no actions"):
        ActionStats.of_actions(np.empty((0, 2)))


def test_what_cannot_be_encoded_is_refused() -> None:
    stats = ActionStats.create([-1.0, 0.0], [1.0, 0.0], [True, False])
    with pytest.raises(ValueError, match=r"action at \[1, 0\] is nan"):
        stats.normalise(np.array([[0.0, 0.0], [np.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"action at \[1, 1\] is 1.57 in a dimension without statistics"):
        stats.normalise(np.array([[5.0, -1.0], [0.0, 1.57]]))
    assert stats.normalise(np.array([0.5, 0.25])).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("count", [150, 300, 350, 1000])
def test_moves_in_one_step_of_a_hundred_keep_their_range(count: int) -> None:
    """An interpolated quantile lies on the way to them, so that they would decode to a hundredth of themselves."""
    for sign in (1.0, -1.0):
        actions = np.zeros((count, 1))
        actions[: count - 1 - int(0.99 * (count - 1)), 0] = 0.3 * sign
        assert np.quantile(actions, 0.99 if sign > 0 else 0.01) not in (0.0, 0.3 * sign)
        assert np.abs(coded(actions) - actions).max() <= 0.3 / 255 / 2 + 1e-9
