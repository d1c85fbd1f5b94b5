"""Potential-based shaping: a dense reward that keeps the optimal policy."""

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from reachrl.functional.discount import discounts
from reachrl.types import Rollout


def terminal_steps(rollout: Rollout, *, bootstrap_truncated: bool) -> Bool[np.ndarray, "T N"]:
    """The valid steps after which the learner expects no more reward; a time limit only where it says so."""
    ended = rollout.terminated if bootstrap_truncated else rollout.terminated | rollout.truncated
    return ended & rollout.valid


def potential_difference(
    before: Float32[np.ndarray, "T N"],
    after: Float32[np.ndarray, "T N"],
    terminal: Bool[np.ndarray, "T N"],
    executed: Int32[np.ndarray, "T N"],
    *,
    gamma: float,
) -> Float32[np.ndarray, "T N"]:
    """`gamma ** executed * after - before`, the potential of a terminal state being 0.

    It is the discounted sum of `gamma * next - now` over a decision's control steps: the potentials between cancel.

    Args:
        before: potential of the state each decision began in.
        after: potential of the state it led to; ignored where `terminal`.
        terminal: decisions that end the episode for the learner.
        executed: control steps of each.
        gamma: the learner's discount; another one changes the best policy.

    Source: Ng, Harada and Russell 1999, Policy invariance under reward transformations, theorem 1.
    """
    return discounts(gamma, executed).astype(np.float32) * np.where(terminal, np.float32(0), after) - before


def pay_at_ends(
    scores: Float32[np.ndarray, "L+1"],
    ends: Int64[np.ndarray, "S"],
    executed: Int32[np.ndarray, "L"],
    *,
    potential: bool,
    gamma: float,
    terminal: bool,
) -> Float32[np.ndarray, "L"]:
    """Dense reward of one episode (or of the part of it in a rollout), paid at the last decision of each segment only.

    As a sum, a segment pays the score of the frame it ended on. As a potential, it pays the difference over the
    segment; the start's potential is divided by the discount of the segment's length, so that the discounted sum
    from any segment's start on is that of paying at every decision, and the best policy stays the best.

    Args:
        scores: of the frames: before the first decision, then after each of L decisions.
        ends: the segments' last decisions, ascending, the last of them L - 1.
        executed: control steps of each decision.
        potential: whether scores are potentials.
        gamma: the learner's discount.
        terminal: whether the last decision ends the episode for the learner; its potential is then 0.
    """
    paid = np.zeros(len(scores) - 1, dtype=np.float32)
    if not potential:
        paid[ends] = scores[ends + 1] * discounts(gamma, executed[ends] - 1).astype(np.float32)
        return paid
    scores = scores.copy()
    if terminal:
        scores[-1] = 0.0
    starts = np.concatenate([[0], ends[:-1] + 1])
    clock = np.concatenate([[0], np.cumsum(executed)])  # control steps before each decision
    followed = discounts(gamma, executed[ends]).astype(np.float32) * scores[ends + 1]
    paid[ends] = followed - scores[starts] * np.float64(gamma) ** (clock[starts] - clock[ends])
    return paid


def pay_new_highs(
    scores: Float32[np.ndarray, "L"], highest: float, executed: Int32[np.ndarray, "L"], *, gamma: float
) -> tuple[Float32[np.ndarray, "L"], float]:
    """Dense reward of one episode (or of the part of it in a rollout): each rise above the highest score so far.

    A keyframe is paid when it is reached and never again, so an episode earns at most the difference between the
    highest score and the first, however long it lasts.

    Args:
        scores: of the frame that each of L decisions led to.
        highest: the highest score before them, that of the episode's first frame included.
        executed: control steps of each decision; a frame is seen after the last of them.
        gamma: the learner's discount.

    Returns:
        the rewards, and the highest score after them.
    """
    reached = np.maximum.accumulate(np.concatenate([np.array([highest], np.float32), scores]))
    return np.diff(reached) * discounts(gamma, executed - 1).astype(np.float32), float(reached[-1])
