"""Likely causes of a run that does not learn: each a pure function of its metrics records."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

WARM_START = "docs/how-to/simulator.md, Warm start"

_LEAST_EPISODES = 20  # of a task, before its failures say something


_EASY = 0.2  # success of a task that shows that another one's failures are its own


_OFTEN = 0.9


_CLIPPED = 0.3  # of the action numbers: seldom with right statistics, always with those of other units


_STILL = 0.02  # of half the range: actions so small move nothing


_GRIPPER_APART = 0.5  # of the opening, 0 closed to 1 open


_LATE_GAIN = 0.02  # of the way to the goal, in the last quarter of an episode


_COLLAPSED = 0.1  # of the entropy that the run began with


@dataclass(frozen=True, slots=True)
class Finding:
    """One likely cause, with what to try."""

    name: str
    """A short name, such as `gripper inverted`."""
    words: str
    """What the figures say."""
    remedy: str
    """What to try first."""


def pooled(rows: Sequence[Row]) -> tuple[int, int]:
    """Successes and episodes of all records."""
    return sum(row["success_k"] for row in rows), sum(row["success_n"] for row in rows)


def hopeless_tasks(recent: Sequence[Row]) -> list[str]:
    """Tasks without any success, where another one succeeds often enough."""
    counts = _by_task(recent)
    if not any(n and k >= _EASY * n for k, n in counts.values()):
        return []
    return [task for task, (k, n) in counts.items() if not k and n >= _LEAST_EPISODES]


def _by_task(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        for key, count in row.items():
            if key.startswith("task_episodes/"):
                task = key.removeprefix("task_episodes/")
                k, n = found.get(task, (0, 0))
                found[task] = k + row.get(f"task_successes/{task}", 0), n + count
    return found


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None and row[key] == row[key]]


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean of a figure over the records that know it; NaN where none does."""
    values = _values(rows, key)
    return sum(values) / len(values) if values else math.nan


def situation(recent: Sequence[Row]) -> str:
    """The figures that every warning gives."""
    counts = _by_task(recent)
    tasks = ", ".join(f"{task} {k}/{n}" for task, (k, n) in list(counts.items())[:8])
    said = [f"tasks: {tasks}{', ...' if len(counts) > 8 else ''}"] if counts else []
    for key, form in (
        ("actions/at_bounds", "{:.0%} of the action numbers at their bounds"),
        ("entropy", "entropy {:.2f} nats a token"),
        ("truncated", "{:.0%} of the episodes cut off by the time limit"),
    ):
        value = mean(recent, key)
        said += [] if math.isnan(value) else [form.format(value)]
    return "; ".join(said) or "no further figures"


def wrong_statistics(recent: Sequence[Row]) -> Finding | None:
    """Many action numbers beyond the bounds, or hardly any motion: statistics of another data set or unit."""
    clipped, size = mean(recent, "actions/beyond_bounds"), mean(recent, "actions/size")
    remedy = (
        "check the action statistics: `reachrl model info` shows those of the policy, which must be those of this "
        "environment's actions (policy.dataset chooses among several)"
    )
    if clipped >= _CLIPPED:
        words = (
            f"wrong action statistics: {clipped:.0%} of the action numbers lie beyond what the environment carries out"
        )
        return Finding(
            "wrong action statistics", f"{words}, their mean size is {size:.3g} times half the range", remedy
        )
    if size <= _STILL:
        words = f"wrong action statistics: the mean action is {size:.2g} of half the range, so the arm hardly moves"
        return Finding("wrong action statistics", words, remedy)
    return None


def inverted_gripper(recent: Sequence[Row], demos: Row | None) -> Finding | None:
    """The gripper begins episodes unlike that of the demonstrations."""
    ours, theirs = mean(recent, "gripper/early"), (demos or {}).get("gripper/early")
    if theirs is None or not abs(ours - theirs) >= _GRIPPER_APART:
        return None
    return Finding(
        "gripper inverted",
        f"gripper inverted: after three decisions it is open to {ours:.0%}, in the demonstrations to {theirs:.0%}",
        "swap the meaning of the gripper's number (env.gripper on LIBERO; elsewhere in the environment or the action "
        "statistics)",
    )


def frozen(recent: Sequence[Row]) -> Finding | None:
    """No weight of the policy has moved."""
    rows = [row for row in recent if not row.get("warming_up")]
    if not rows:
        return None
    still = all(not row.get("policy_steps", 1) or row.get("kl") == 0 or row.get("changed_weights") == 0 for row in rows)
    if not still:
        return None
    return Finding(
        "frozen policy",
        "frozen policy: no weight of it has moved in these iterations",
        "raise algorithm.lr, look at changed_weights, and check that advantages are not all 0 (a reward that never "
        "differs teaches nothing)",
    )


def short_horizon(recent: Sequence[Row], demos: Row | None, max_steps: int | None) -> Finding | None:
    """Nearly all episodes end at the time limit, still on their way."""
    if not mean(recent, "truncated") >= _OFTEN:
        return None
    gain, end = mean(recent, "progress/late_gain"), mean(recent, "progress/end")
    needed = (demos or {}).get("length_mean")
    closing = gain >= _LATE_GAIN and end < 1
    tight = needed is not None and max_steps is not None and needed > _OFTEN * max_steps
    if not (closing or tight):
        return None
    if tight:
        words = f"horizon too short: the experts' episodes take {needed:.0f} of {max_steps} decisions"
    else:
        words = f"horizon too short: failures come {end:.0%} of the way and gain {gain:.0%} in their last quarter"
    return Finding("horizon too short", words, "raise env.max_steps (and rollout.num_steps with it)")


def entropy_collapse(recent: Sequence[Row], *, begun: float, highest: float) -> Finding | None:
    """The entropy fell to a fraction of what the run began with.

    Args:
        recent: the last records.
        begun: highest entropy of the run's first half; NaN where none is known.
        highest: of the whole run.
    """
    now = mean(recent, "entropy")
    if not now <= _COLLAPSED * begun:
        return None
    return Finding(
        "entropy collapse",
        f"entropy collapse: from {highest:.2f} to {now:.2f} nats a token",
        "go on from an earlier checkpoint with algorithm.entropy_floor or a lower algorithm.lr, or sample at a "
        "higher rollout.temperature",
    )


def parted_reward(recent: Sequence[Row]) -> Finding | None:
    """The dense reward no longer goes with success."""
    alarms = mean(recent, "audit/alarm")
    correlation = mean(recent, "audit/return_correlation")
    if not (alarms >= 0.5 or correlation < 0):
        return None
    return Finding(
        "reward parted from success",
        "the dense reward has parted from success: failures earn as much as successes or more",
        "lower reward.weight, use reward.mode=potential, or refit the reward model (reward_model.refit_every)",
    )


def blind_critic(recent: Sequence[Row]) -> Finding | None:
    """The critic explains nothing of the returns."""
    explained = _values(recent, "explained_variance")
    if len(explained) < len(recent) or max(explained) > 0:
        return None
    return Finding(
        "critic blind",
        f"critic blind: it explains none of the returns' variance (at best {max(explained):.2f})",
        "raise algorithm.warmup_iterations or algorithm.value_epochs, and check algorithm.value_lr",
    )


def impossible_task(tasks: Sequence[str], recent: Sequence[Row]) -> Finding | None:
    """A task without success while others succeed."""
    if not tasks:
        return None
    counts = _by_task(recent)
    shown = ", ".join(f"{task} (0 of {counts[task][1]})" for task in tasks)
    return Finding(
        "impossible task",
        f"{shown} never succeeds: too hard for this policy, or impossible in this environment",
        "see whether the expert solves it (`reachrl demos`), demonstrate it more often, or leave it out of env.tasks",
    )


def no_success(recent: Sequence[Row], demos: Row | None) -> Finding | None:
    """Successes are too rare to learn from."""
    chances = {
        key.removeprefix("curriculum_success/"): value
        for row in recent[-1:]
        for key, value in row.items()
        if key.startswith("curriculum_success/") and value is not None
    }
    easiest = max(chances, key=lambda task: chances[task]) if chances else None
    words = "never a success in the buffer: without one there is nothing to reinforce"
    words += f"; the easiest task by the curriculum's estimate is {easiest}" if easiest else ""
    length = (demos or {}).get("length_mean")
    words += f"; the experts need {length:.0f} decisions" if length is not None else ""
    dense = any(row.get("reward/process") is not None for row in recent)  # then it is no advice
    others = "or easier tasks" if dense else "easier tasks, or a dense reward (reward.kind=process)"
    return Finding(
        "never a success",
        words,
        "begin with a warm start that succeeds now and then (raise demos.episodes_per_task or sft.epochs, see "
        f"{WARM_START}), {others}",
    )
