"""Why a run does not learn, in words: pure functions of its metrics records."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reachrl.functional.stats import wilson

Row = dict[str, Any]
PAGE = "docs/how-to/my-run-does-not-learn.md"

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


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with the last iterations, and why."""

    trouble: str
    """`no success`, `falling`, or `a task without success`."""
    summary: str
    """Task, share of actions at their bounds, entropy, share of truncated episodes."""
    findings: tuple[Finding, ...]
    """The likeliest first; without any, the figures name no cause."""

    def text(self) -> str:
        """All of it as one paragraph, with at most three things to try."""
        causes = " ".join(f"Likely cause: {each.words}." for each in self.findings[:3])
        tries = [each.remedy for each in self.findings]
        tries += [each for each in _GENERAL if each not in tries]
        numbered = "; ".join(f"({number}) {each}" for number, each in enumerate(tries[:3], start=1))
        return f"{self.summary}. {causes or 'The figures name no single cause.'} Try: {numbered}. See {PAGE}"


_GENERAL = (
    "look at the films of failures in the report: does the arm go to the object at all",
    "raise demos.episodes_per_task or sft.epochs, so that the warm start succeeds now and then",
    "give env.max_steps more decisions",
)


def diagnose(
    rows: Sequence[Row], *, after: int, demos: Row | None = None, max_steps: int | None = None
) -> Diagnosis | None:
    """Why success stays at 0 or falls; None while a run is healthy or young.

    Args:
        rows: training records, in order.
        after: iterations without success, or of a fall, from which on something is said.
        demos: the record of the demonstrations, where there are any.
        max_steps: decisions until an episode is cut off.
    """
    recent = _latest_with_episodes(rows, after)
    if len(recent) < after:
        return None
    k, n = _pooled(recent)
    trouble, tasks = None, _hopeless_tasks(recent)
    if k == 0:
        trouble, begin = "no success", f"none of the {n} episodes of the last {after} iterations succeeded"
    elif (best := _best_before(rows, recent, after)) is not None and wilson(*best)[0] > wilson(k, n)[1]:
        trouble = "falling"
        begin = (
            f"success fell to {k} of {n} episodes in the last {after} iterations, from {best[0]} of {best[1]} before"
        )
    elif tasks:
        trouble = "a task without success"
        begin = f"{', '.join(tasks)}: none of the episodes of the last {after} iterations succeeded, other tasks do"
    else:
        return None
    checks: tuple[Callable[[], Finding | None], ...] = (
        lambda: _wrong_statistics(recent),
        lambda: _inverted_gripper(recent, demos),
        lambda: _frozen(recent),
        lambda: _short_horizon(recent, demos, max_steps),
        lambda: _entropy_collapse(rows, recent),
        lambda: _parted_reward(recent),
        lambda: _blind_critic(recent),
        lambda: _impossible_task(tasks, recent) if k else None,
        lambda: _no_success(recent, demos) if not k else None,
    )
    findings = tuple(found for check in checks if (found := check()) is not None)
    return Diagnosis(trouble, f"{begin} ({_situation(recent)})", findings)


class Explainer:
    """Follows a run's training records and says each trouble once.

    Args:
        rows: the records of what was trained before, of a resumed run; their trouble was told then.
        options: of `diagnose`.
    """

    def __init__(self, rows: Sequence[Row], *, after: int, demos: Row | None, max_steps: int) -> None:
        self._rows, self._after, self._demos, self._max_steps = list(rows), after, demos, max_steps
        found = self._diagnose()
        self._told = {found.trouble} if found else set[str]()

    def observe(self, row: Row) -> Diagnosis | None:
        """Take in one iteration; the diagnosis of a trouble that was not told yet, or None."""
        self._rows.append(row)
        found = self._diagnose()
        if found is None or found.trouble in self._told:
            return None
        self._told.add(found.trouble)
        return found

    def _diagnose(self) -> Diagnosis | None:
        return diagnose(self._rows, after=self._after, demos=self._demos, max_steps=self._max_steps)


def _latest_with_episodes(rows: Sequence[Row], count: int) -> list[Row]:
    return [row for row in rows if row.get("success_n")][-count:]


def _pooled(rows: Sequence[Row]) -> tuple[int, int]:
    return sum(row["success_k"] for row in rows), sum(row["success_n"] for row in rows)


def _best_before(rows: Sequence[Row], recent: Sequence[Row], after: int) -> tuple[int, int] | None:
    """The highest pooled success of `after` iterations in a row before the recent ones.

    A curriculum draws what is hard more often than what is easy, so success as drawn may fall while the policy
    improves: where `success_uniform` is known and did not fall, nothing did.
    """
    known = [row for row in rows if row.get("success_n")][: -len(recent)]
    windows = [known[start : start + after] for start in range(len(known) - after + 1)]
    if not windows:
        return None
    best = max(windows, key=lambda window: _pooled(window)[0] / _pooled(window)[1])
    then, now = _mean(best, "success_uniform"), _mean(recent, "success_uniform")
    return None if not now < 0.75 * then and not math.isnan(then - now) else _pooled(best)


def _hopeless_tasks(recent: Sequence[Row]) -> list[str]:
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


def _mean(rows: Sequence[Row], key: str) -> float:
    values = _values(rows, key)
    return sum(values) / len(values) if values else math.nan


def _situation(recent: Sequence[Row]) -> str:
    """The figures that every warning gives."""
    counts = _by_task(recent)
    tasks = ", ".join(f"{task} {k}/{n}" for task, (k, n) in list(counts.items())[:8])
    said = [f"tasks: {tasks}{', ...' if len(counts) > 8 else ''}"] if counts else []
    for key, form in (
        ("actions/at_bounds", "{:.0%} of the action numbers at their bounds"),
        ("entropy", "entropy {:.2f} nats a token"),
        ("truncated", "{:.0%} of the episodes cut off by the time limit"),
    ):
        value = _mean(recent, key)
        said += [] if math.isnan(value) else [form.format(value)]
    return "; ".join(said) or "no further figures"


def _wrong_statistics(recent: Sequence[Row]) -> Finding | None:
    clipped, size = _mean(recent, "actions/beyond_bounds"), _mean(recent, "actions/size")
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


def _inverted_gripper(recent: Sequence[Row], demos: Row | None) -> Finding | None:
    ours, theirs = _mean(recent, "gripper/early"), (demos or {}).get("gripper/early")
    if theirs is None or not abs(ours - theirs) >= _GRIPPER_APART:
        return None
    return Finding(
        "gripper inverted",
        f"gripper inverted: after three decisions it is open to {ours:.0%}, in the demonstrations to {theirs:.0%}",
        "swap the meaning of the gripper's number (env.gripper on LIBERO; elsewhere in the environment or the action "
        "statistics)",
    )


def _frozen(recent: Sequence[Row]) -> Finding | None:
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


def _short_horizon(recent: Sequence[Row], demos: Row | None, max_steps: int | None) -> Finding | None:
    if not _mean(recent, "truncated") >= _OFTEN:
        return None
    gain, end = _mean(recent, "progress/late_gain"), _mean(recent, "progress/end")
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


def _entropy_collapse(rows: Sequence[Row], recent: Sequence[Row]) -> Finding | None:
    values = _values(rows, "entropy")
    now = _mean(recent, "entropy")
    if not values or not now <= _COLLAPSED * max(values[: max(1, len(values) // 2)]):
        return None
    return Finding(
        "entropy collapse",
        f"entropy collapse: from {max(values):.2f} to {now:.2f} nats a token",
        "go on from an earlier checkpoint with algorithm.entropy_floor or a lower algorithm.lr, or sample at a "
        "higher rollout.temperature",
    )


def _parted_reward(recent: Sequence[Row]) -> Finding | None:
    alarms = _mean(recent, "audit/alarm")
    correlation = _mean(recent, "audit/return_correlation")
    if not (alarms >= 0.5 or correlation < 0):
        return None
    return Finding(
        "reward parted from success",
        "the dense reward has parted from success: failures earn as much as successes or more",
        "lower reward.weight, use reward.mode=potential, or refit the reward model (reward_model.refit_every)",
    )


def _blind_critic(recent: Sequence[Row]) -> Finding | None:
    explained = _values(recent, "explained_variance")
    if len(explained) < len(recent) or max(explained) > 0:
        return None
    return Finding(
        "critic blind",
        f"critic blind: it explains none of the returns' variance (at best {max(explained):.2f})",
        "raise algorithm.warmup_iterations or algorithm.value_epochs, and check algorithm.value_lr",
    )


def _impossible_task(tasks: Sequence[str], recent: Sequence[Row]) -> Finding | None:
    if not tasks:
        return None
    counts = _by_task(recent)
    shown = ", ".join(f"{task} (0 of {counts[task][1]})" for task in tasks)
    return Finding(
        "impossible task",
        f"{shown} never succeeds: too hard for this policy, or impossible in this environment",
        "see whether the expert solves it (`reachrl demos`), demonstrate it more often, or leave it out of env.tasks",
    )


def _no_success(recent: Sequence[Row], demos: Row | None) -> Finding | None:
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
    return Finding(
        "never a success",
        words,
        "begin with a warm start that succeeds now and then (more demonstrations, longer sft), easier tasks, or a "
        "dense reward (reward.kind=process)",
    )
