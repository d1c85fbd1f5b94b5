"""Advantages within groups: against recorded values of another code base, and closed forms."""

import numpy as np
import pytest

from reachrl.functional.groups import episode_weights, group_advantages, informative

RETURNS = np.array([1.0, 0.0, 0.0, 1.0, 0.25, 1.5, -0.75, 0.5, 0.0, 0.0, 0.0, 1.0])
GROUPS = np.repeat([5, 2, 9], 4)
# What the statements of `compute_grpo_advantages` give for these returns in groups of 4.
# Source: https://github.com/RLinf/RLinf, rlinf/algorithms/advantages.py at 01cd92779437bad0be96d9b303de9db518544e6e.
RLINF = [0.8660239, -0.8660239, -0.8660239, 0.8660239, -0.1352503, 1.2172526, -1.2172526, 0.1352503]
RLINF += [-0.499999, -0.499999, -0.499999, 1.499997]


def test_grpo_equals_recorded_values():
    found = group_advantages(RETURNS, GROUPS, baseline="mean", divide_by_std=True)
    np.testing.assert_allclose(found, RLINF, atol=1e-6)


def test_without_the_deviation_it_is_the_distance_from_the_mean():
    found = group_advantages(RETURNS, GROUPS, baseline="mean", divide_by_std=False)
    np.testing.assert_allclose(found, [0.5, -0.5, -0.5, 0.5, -0.125, 1.125, -1.125, 0.125, -0.25, -0.25, -0.25, 0.75])


def test_leave_one_out_is_the_distance_from_the_others():
    found = group_advantages(RETURNS, GROUPS, baseline="leave_one_out", divide_by_std=False)
    expected = []
    for place, (value, group) in enumerate(zip(RETURNS, GROUPS, strict=True)):
        others = [r for other, (r, g) in enumerate(zip(RETURNS, GROUPS, strict=True)) if g == group and other != place]
        expected.append(value - sum(others) / len(others))
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("divide", [False, True])
def test_groups_may_be_interleaved_and_unequal_and_one_alone_has_nothing_to_compare(baseline, divide):
    order = np.random.default_rng(0).permutation(12)
    options = {"baseline": baseline, "divide_by_std": divide}
    mixed = group_advantages(RETURNS[order], GROUPS[order], **options)
    np.testing.assert_allclose(mixed, group_advantages(RETURNS, GROUPS, **options)[order], atol=1e-7)
    assert group_advantages(np.array([3.0]), np.array([1]), **options) == [0.0]
    short = group_advantages(RETURNS[:3], GROUPS[:3], **options)  # one of its four was lost
    assert short.sum() == pytest.approx(0, abs=1e-6) and short[0] > 0 > short[1] == short[2]


def test_groups_of_equal_returns_are_uninformative():
    returns = np.array([1.0, 1.0, 0.0, 1.0, 0.5, 0.5 + 1e-9, 2.0])
    assert informative(returns, np.array([0, 0, 1, 1, 2, 2, 3])).tolist() == [False, False, True, True] + [False] * 3


def test_weights_of_episodes_sum_alike_and_are_one_on_average():
    lengths = np.array([2, 6, 4])
    weights = episode_weights(lengths)
    assert np.ptp(weights * lengths) < 1e-12 and (weights * lengths).sum() == pytest.approx(12)
