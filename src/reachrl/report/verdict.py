"""What a run's held-out evaluations say, in one sentence."""

from typing import Any

from reachrl.report.findings import WARM_START
from reachrl.report.formats import tenths

SIGNIFICANT = 0.05


def advice(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str | None:
    """What to do where no episode succeeded, before or after; None where one did, or not both were evaluated."""
    if not before or not after or before["k"] or after["k"] or not after["n"]:
        return None
    return (
        "No held-out episode succeeded before reinforcement learning, so there was next to nothing to reinforce. Make "
        "the warm start succeed now and then first (20 to 60 % is best): raise demos.episodes_per_task and sft.epochs, "
        f"or begin with easier tasks. See {WARM_START}."
    )


def verdict(
    before: dict[str, Any] | None, after: dict[str, Any] | None, paired: dict[str, Any] | None, *, seed: int | None
) -> dict[str, str] | None:
    """The first sentence of the report: better, worse, or no evidence of either.

    Args:
        before: Success before reinforcement learning: `k`, `n` and `rate`.
        after: The same, after it.
        paired: `improved`, `worsened` and `p_value` of the paired test over the same starts.
        seed: The run's.

    Returns:
        The `text` and the `css` class that colours it: `good`, `bad` or `neutral`; None without both evaluations.
    """
    if not before or not after:
        return None
    moved = f"held-out success went from {tenths(before['rate'])} to {tenths(after['rate'])}"
    seeds = "one seed" if seed is None else f"one seed: {seed}"
    if not paired:
        return {"css": "neutral", "text": f"Not tested: {moved}, without a paired test of the same starts ({seeds})."}
    p = f"p = {paired['p_value']:.2g}"
    test = f"paired test of the same {after['n']} starts, {p}; {seeds}"
    if paired["p_value"] >= SIGNIFICANT or paired["improved"] == paired["worsened"]:
        return {"css": "neutral", "text": f"No evidence of a change: {moved} ({test})."}
    if paired["improved"] > paired["worsened"]:
        return {"css": "good", "text": f"Better: {moved} ({test})."}
    return {"css": "bad", "text": f"Worse: {moved} ({test})."}
