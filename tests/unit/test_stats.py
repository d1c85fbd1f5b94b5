"""Statistics against published or enumerated values."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest

from reachrl.functional.stats import explained_variance, paired_test, seed_interval, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe 1998, table I, method 3 (score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_intervals(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)


@given(n=st.integers(1, 400), data=st.data())
def test_wilson_is_symmetric_and_holds_the_rate(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    mirrored = wilson(n - k, n)
    assert low - 1e-12 <= k / n <= high + 1e-12
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_wilson_of_nothing_is_everything_and_nonsense_is_refused():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="k=5, n=4"):
        wilson(5, 4)


@pytest.mark.parametrize(("improved", "worsened"), [(0, 0), (5, 0), (7, 2), (3, 3), (1, 6)])
def test_paired_test_equals_enumerating_every_sign_flip(improved, worsened):
    before = [False] * improved + [True] * worsened + [True, False, True]
    after = [True] * improved + [False] * worsened + [True, False, True]
    result = paired_test(before, after)
    n = improved + worsened
    extreme = abs(improved - worsened)
    flips = list(itertools.product((-1, 1), repeat=n))
    expected = sum(abs(sum(flip)) >= extreme for flip in flips) / len(flips)
    assert (result.improved, result.worsened) == (improved, worsened)
    assert result.p_value == pytest.approx(expected)


def test_paired_test_wants_the_same_episodes():
    with pytest.raises(ValueError, match="same episodes"):
        paired_test([True], [True, False])


def test_explained_variance():
    targets = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    assert explained_variance(targets, targets) == pytest.approx(1.0)
    assert explained_variance(targets * 0 + 2.5, targets) == pytest.approx(0.0)
    assert explained_variance(-targets, targets) == pytest.approx(1 - 4)  # residuals vary twice as widely
    assert explained_variance(targets, np.ones(4, np.float32)) == 0.0


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 30, 101])
def test_the_interval_over_seeds_equals_scipys(count):
    values = np.random.default_rng(count).normal(3, 5, count)
    mean, low, high = seed_interval(values.tolist())
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(expected, rel=1e-9)


def test_three_seeds_carry_what_three_seeds_carry():
    mean, low, high = seed_interval([3.3, -1.7, 8.8])
    assert (mean, high - mean) == pytest.approx((3.47, 13.05), abs=0.01) and low < 0
    assert seed_interval([5.0]) == (5.0, -np.inf, np.inf)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (3, 20), (41, 100), (1, 1)])
def test_wilson_against_scipy(k: int, n: int) -> None:
    assert wilson(k, n) == pytest.approx(binomtest(k, n).proportion_ci(method="wilson"), abs=1e-12)
