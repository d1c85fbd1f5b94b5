"""Environments dealt out to actors: against every possible division."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reachrl.backends.shares import even_shares, firsts, proportional_shares, step_time


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=4), st.integers(0, 7), st.integers(1, 3))
def test_no_other_division_is_faster(seconds, more, least):
    total = least * len(seconds) + more
    shares = proportional_shares(total, seconds, least=least)
    assert sum(shares) == total and min(shares) >= least
    every = (each for each in product(range(least, least + more + 1), repeat=len(seconds)) if sum(each) == total)
    assert step_time(shares, seconds) == pytest.approx(min(step_time(each, seconds) for each in every))


def test_twice_as_fast_gets_twice_as_many():
    assert proportional_shares(12, [1.0, 2.0]) == [8, 4]
    assert proportional_shares(4, [1.0, 1.0, 100.0]) == [2, 1, 1]
    assert step_time([8, 4], [1.0, 2.0]) == 8.0


@given(st.integers(1, 9), st.integers(0, 40))
def test_even_shares_differ_by_one(count, more):
    shares = even_shares(count + more, count)
    assert sum(shares) == count + more and max(shares) - min(shares) <= 1 and min(shares) >= 1
    assert [b - a for a, b in pairwise([*firsts(shares), count + more])] == shares
