"""Why a run does not learn, in words, by its metrics records alone."""

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reachrl.functional.stats import wilson
from reachrl.report.findings import (
    Finding,
    Row,
    blind_critic,
    entropy_collapse,
    frozen,
    hopeless_tasks,
    impossible_task,
    inverted_gripper,
    mean,
    no_success,
    parted_reward,
    pooled,
    short_horizon,
    situation,
    wrong_statistics,
)

PAGE = "docs/how-to/my-run-does-not-learn.md"


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
    "give env.max_steps more decisions",
)


class _Past:
    """What a diagnosis needs of a run's training records, however many there were.

    Args:
        after: iterations without success, or of a fall, from which on something is said.
    """

    def __init__(self, after: int) -> None:
        self.recent: deque[Row] = deque(maxlen=after)
        """The last records in which episodes ended."""
        self._before: deque[Row] = deque(maxlen=after)  # likewise, of those before the recent ones
        self._best: tuple[int, int] | None = None
        self._best_uniform = math.nan
        self._highest = array("d")  # entropy up to each record that knows it

    def add(self, row: Row) -> None:
        """Take in the next record."""
        entropy = row.get("entropy")
        if entropy is not None and not math.isnan(entropy):
            self._highest.append(max(entropy, self._highest[-1]) if self._highest else entropy)
        if not row.get("success_n"):
            return
        if len(self.recent) == self.recent.maxlen:
            self._before.append(self.recent[0])
            if len(self._before) == self._before.maxlen:
                k, n = pooled(self._before)
                if self._best is None or k / n > self._best[0] / self._best[1]:
                    self._best, self._best_uniform = (k, n), mean(self._before, "success_uniform")
        self.recent.append(row)

    def best_before(self) -> tuple[int, int] | None:
        """The highest pooled success of so many iterations in a row before the recent ones.

        A curriculum draws what is hard more often than what is easy, so success as drawn may fall while the policy
        improves: where `success_uniform` is known and did not fall, nothing did.
        """
        then, now = self._best_uniform, mean(self.recent, "success_uniform")
        return None if not now < 0.75 * then and not math.isnan(then - now) else self._best

    def entropy(self) -> tuple[float, float]:
        """The highest of the first half of the records, and of all; NaN where none is known."""
        values = self._highest
        return (values[max(1, len(values) // 2) - 1], values[-1]) if values else (math.nan, math.nan)


def diagnose(
    rows: Iterable[Row], *, after: int, demos: Row | None = None, max_steps: int | None = None
) -> Diagnosis | None:
    """Why success stays at 0 or falls; None while a run is healthy or young.

    Args:
        rows: training records, in order.
        after: iterations without success, or of a fall, from which on something is said.
        demos: the record of the demonstrations, where there are any.
        max_steps: decisions until an episode is cut off.
    """
    past = _Past(after)
    for row in rows:
        past.add(row)
    return _diagnosed(past, after, demos, max_steps)


def _diagnosed(past: _Past, after: int, demos: Row | None, max_steps: int | None) -> Diagnosis | None:
    recent = list(past.recent)
    if len(recent) < after:
        return None
    k, n = pooled(recent)
    trouble, tasks = None, hopeless_tasks(recent)
    begun, highest = past.entropy()
    if k == 0:
        trouble, begin = "no success", f"none of the {n} episodes of the last {after} iterations succeeded"
    elif (best := past.best_before()) is not None and wilson(*best)[0] > wilson(k, n)[1]:
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
        lambda: wrong_statistics(recent),
        lambda: inverted_gripper(recent, demos),
        lambda: frozen(recent),
        lambda: short_horizon(recent, demos, max_steps),
        lambda: entropy_collapse(recent, begun=begun, highest=highest),
        lambda: parted_reward(recent),
        lambda: blind_critic(recent),
        lambda: impossible_task(tasks, recent) if k else None,
        lambda: no_success(recent, demos) if not k else None,
    )
    findings = tuple(found for check in checks if (found := check()) is not None)
    return Diagnosis(trouble, f"{begin} ({situation(recent)})", findings)


class Explainer:
    """Follows a run's training records and says each trouble once.

    Args:
        rows: the records of what was trained before, of a resumed run; their trouble was told then.
        options: of `diagnose`.
    """

    def __init__(self, rows: Iterable[Row], *, after: int, demos: Row | None, max_steps: int) -> None:
        self._past, self._after, self._demos, self._max_steps = _Past(after), after, demos, max_steps
        for row in rows:
            self._past.add(row)
        found = self._diagnose()
        self._told = {found.trouble} if found else set[str]()

    def observe(self, row: Row) -> Diagnosis | None:
        """Take in one iteration; the diagnosis of a trouble that was not told yet, or None."""
        self._past.add(row)
        found = self._diagnose()
        if found is None or found.trouble in self._told:
            return None
        self._told.add(found.trouble)
        return found

    def _diagnose(self) -> Diagnosis | None:
        return _diagnosed(self._past, self._after, self._demos, self._max_steps)
