"""Generalised advantage estimation over decisions, with time limits told from failures."""

import numpy as np
from jaxtyping import Bool, Float32, Int32

from reachrl.functional.discount import discounts


def gae(
    rewards: Float32[np.ndarray, "T N"],
    values: Float32[np.ndarray, "T1 N"],
    final_values: Float32[np.ndarray, "T N"],
    terminated: Bool[np.ndarray, "T N"],
    truncated: Bool[np.ndarray, "T N"],
    valid: Bool[np.ndarray, "T N"],
    executed: Int32[np.ndarray, "T N"],
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_truncated: bool = True,
) -> tuple[Float32[np.ndarray, "T N"], Float32[np.ndarray, "T N"]]:
    """Advantages and returns of every decision.

    What follows a step is worth `values[t + 1]` inside an episode, `final_values[t]` (the value of the true
    final frame) where a time limit cut it, and 0 where it terminated. No advantage flows across an episode
    end. A row that is not valid lost its worker: it gets advantage 0 and the step before it ends with the
    value of its own next state.

    A decision of several control steps discounts what follows once for each of them, so that `gamma` means the same
    whatever the length of chunks; `gae_lambda` weighs decisions, as nobody values the states inside a chunk.

    Args:
        rewards: reward of each decision, seen from its beginning.
        values: state values, one more than steps; the last row is the bootstrap of running episodes.
        final_values: value of the final frame at steps that ended; read only where truncated.
        terminated: the episode ended by itself (success).
        truncated: the episode was cut by the time limit.
        valid: the row is data.
        executed: control steps of each decision.
        gamma: discount per control step.
        gae_lambda: weight of longer returns.
        bootstrap_truncated: false treats a time limit as termination, as the paper's code does.

    Returns:
        advantages f32[T N] and returns f32[T N] = advantages + values.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; time limits: Pardo et al. 2018 (arXiv 1712.00378);
    decisions of several steps: Sutton, Precup and Singh 1999 (options), eq. 2.
    """
    num_steps = rewards.shape[0]
    cut = final_values if bootstrap_truncated else np.zeros_like(final_values)
    following = np.where(terminated, 0.0, np.where(truncated, cut, values[1:]))
    discount = discounts(gamma, executed)
    delta = rewards + discount.astype(np.float32) * following - values[:-1]
    advantages = np.zeros_like(rewards)
    running = np.zeros(rewards.shape[1], dtype=rewards.dtype)
    for t in reversed(range(num_steps)):
        goes_on = ~(terminated[t] | truncated[t])
        running = np.where(valid[t], delta[t] + discount[t] * gae_lambda * goes_on * running, 0.0)
        advantages[t] = running
    return advantages.astype(np.float32), (advantages + values[:-1]).astype(np.float32)
