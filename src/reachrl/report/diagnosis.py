"""Why a run does not learn, in words: pure functions of its metrics records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reachrl.functional.stats import wilson
from reachrl.report.findings import (
    Finding,
    Row,
    best_before,
    blind_critic,
    entropy_collapse,
    frozen,
    hopeless_tasks,
    impossible_task,
    inverted_gripper,
    latest_with_episodes,
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
    recent = latest_with_episodes(rows, after)
    if len(recent) < after:
        return None
    k, n = pooled(recent)
    trouble, tasks = None, hopeless_tasks(recent)
    if k == 0:
        trouble, begin = "no success", f"none of the {n} episodes of the last {after} iterations succeeded"
    elif (best := best_before(rows, recent, after)) is not None and wilson(*best)[0] > wilson(k, n)[1]:
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
        lambda: entropy_collapse(rows, recent),
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
