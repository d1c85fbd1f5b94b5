"""GAE against a brute-force sum of discounted TD errors, with hand-worked episode ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reachrl.functional.gae import gae


def brute_force(rewards, values, finals, terminated, truncated, valid, gamma, lam, bootstrap):
    """Every advantage as its own explicit sum over the rest of its episode."""
    steps, envs = rewards.shape
    out = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            if not valid[t, n]:
                continue
            weight, total = 1.0, 0.0
            for k in range(t, steps):
                if not valid[k, n]:
                    break
                if terminated[k, n]:
                    following = 0.0
                elif truncated[k, n]:
                    following = finals[k, n] if bootstrap else 0.0
                else:
                    following = values[k + 1, n]
                total += weight * (rewards[k, n] + gamma * following - values[k, n])
                if terminated[k, n] or truncated[k, n]:
                    break
                weight *= gamma * lam
            out[t, n] = total
    return out


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), bootstrap=st.booleans())
def test_equals_brute_force(seed, bootstrap):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 12)), int(rng.integers(1, 4)))
    rewards, finals = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    values = rng.normal(size=(shape[0] + 1, shape[1])).astype(np.float32)
    ends = rng.integers(0, 5, size=shape)
    terminated, truncated, valid = ends == 0, ends == 1, ends != 2
    advantages, returns = gae(
        rewards,
        values,
        finals,
        terminated,
        truncated,
        valid,
        np.ones(shape, np.int32),
        gamma=0.9,
        gae_lambda=0.8,
        bootstrap_truncated=bootstrap,
    )
    expected = brute_force(rewards, values, finals, terminated, truncated, valid, 0.9, 0.8, bootstrap)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values[:-1], atol=1e-5)


@pytest.mark.parametrize(("truncates", "expected"), [(False, 1.0 - 0.5), (True, 1.0 + 0.9 * 7.0 - 0.5)])
def test_a_time_limit_bootstraps_from_the_final_frame_and_success_does_not(truncates, expected):
    one = np.array([[True]])
    advantages, _ = gae(
        np.array([[1.0]], np.float32),
        np.array([[0.5], [100.0]], np.float32),  # the second value belongs to the next episode
        np.array([[7.0]], np.float32),
        one & (not truncates),
        one & truncates,
        one,
        np.ones((1, 1), np.int32),
        gamma=0.9,
        gae_lambda=1.0,
    )
    assert advantages[0, 0] == pytest.approx(expected)
