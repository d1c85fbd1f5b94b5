"""Action tokens over arbitrary actions and statistics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reachrl.policies.action_tokens import ActionStats, tokens_from_unit, unit_from_tokens

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


def test_a_dimension_that_never_moves_stays_put() -> None:
    stats = ActionStats.create(np.array([0.3, -1]), np.array([0.3, 1]), np.array([True, True]))
    assert stats.normalise(np.array([0.3, 0.5])).tolist() == [0.0, 0.5]
    assert stats.unnormalise(np.array([0.7, 0.5])).tolist() == [0.3, 0.5]


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        ActionStats.create(np.zeros(2), np.zeros(3), np.ones(2, bool))
    with pytest.raises(ValueError, match="finite"):
        ActionStats.create(np.array([np.nan]), np.ones(1), np.ones(1, bool))
