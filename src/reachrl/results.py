"""What training and evaluating give back: success rates with their intervals, metrics, the policy, the files."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from reachrl.errors import ConfigError
from reachrl.evaluation import compare
from reachrl.functional.stats import PairedTest

if TYPE_CHECKING:
    from reachrl.policies.base import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessRate:
    """`k` successes in `n` episodes; `print` shows all of it."""

    k: int
    n: int
    rate: float
    """k / n, 0..1."""
    wilson95: tuple[float, float]
    """Wilson 95 % interval of the rate: the luck of the episodes, not that of the seed."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """From the keys `k`, `n`, `rate` and `wilson95` of a stored record."""
        low, high = record["wilson95"]
        return cls(k=record["k"], n=record["n"], rate=record["rate"], wilson95=(low, high))

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.wilson95)
        return f"{self.k}/{self.n} = {100 * self.rate:.1f} % [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EvaluationResult:
    """One policy on held-out start states, at one temperature."""

    mode: str
    """The temperature by name: `greedy`, `sampled` (1) or such as `sampled@0.6`."""
    success: SuccessRate
    """Over all tasks."""
    per_task: dict[str, SuccessRate]
    episodes: list[dict[str, Any]]
    """`task`, `start`, `success`, `num_steps`, `num_decisions` and `num_malformed` of each episode: rows for
    `pandas.DataFrame`."""
    protocol_hash: str
    """Only rates with the same one may be compared."""
    caveats: tuple[str, ...] = ()
    """What has to stand beside the rate."""

    def __repr__(self) -> str:
        """The rates, without the episodes: what a notebook shows of a cell's last value."""
        tasks = "".join(f"\n  {task}: {rate}" for task, rate in self.per_task.items())
        return f"EvaluationResult {self.mode}: {self.success}{tasks}"

    @classmethod
    def of(cls, mode: str, record: dict[str, Any], *, protocol_hash: str, caveats: tuple[str, ...]) -> Self:
        """From a record of `reachrl.evaluation.outcomes_record`."""
        return cls(
            mode=mode,
            success=SuccessRate.of(record),
            per_task={task: SuccessRate.of(rate) for task, rate in record["per_task"].items()},
            episodes=list(record["episodes"]),
            protocol_hash=protocol_hash,
            caveats=caveats,
        )

    def compare(self, later: "EvaluationResult") -> PairedTest:
        """Exact McNemar test of this evaluation against another one of the same start states.

        Args:
            later: the other one; `improved` counts what failed here and succeeds there.

        Raises:
            ConfigError: the two were not measured by the same protocol, mode or start states.
        """
        if (self.protocol_hash, self.mode) != (later.protocol_hash, later.mode):
            raise ConfigError(
                f"these evaluations cannot be compared: mode {self.mode}, protocol {self.protocol_hash} here, mode "
                f"{later.mode}, protocol {later.protocol_hash} there. Evaluate both in the same way"
            )
        try:
            return compare({"episodes": self.episodes}, {"episodes": later.episodes})
        except ValueError as error:
            raise ConfigError(f"these evaluations cannot be compared: {error}") from error


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainResult:
    """A run, finished or stopped by a callback."""

    folder: Path
    """The run folder."""
    iterations: int
    """Training iterations that are done."""
    stopped: bool
    """Whether a callback ended training; `reachrl.train` with the same folder goes on."""
    metrics: list[dict[str, Any]]
    """One record for each training iteration: rows for `pandas.DataFrame`."""
    before: dict[str, EvaluationResult]
    """The warm-started policy on held-out starts, by temperature (`greedy`, `sampled`, `sampled@0.6`), the headline
    first; empty for a stopped run."""
    after: dict[str, EvaluationResult]
    """The trained policy on the same starts; empty for a stopped run."""
    best: dict[str, EvaluationResult]
    """The weights that did best on validation starts, on the same starts; empty where none were chosen (without
    `eval.during_every`), or where they are the last."""
    policy_folder: Path
    """The policy: `RUN/policy`, or that of the last checkpoint of a stopped run."""
    device: str
    """Where `policy` is loaded to."""

    def __repr__(self) -> str:
        """The run and its rates, without the records: what a notebook shows of a cell's last value."""
        rates = "".join(
            f"\n  {mode}: {self.before[mode].success} before, {after.success} after"
            for mode, after in self.after.items()
            if mode in self.before
        )
        state = "stopped after" if self.stopped else "trained"
        return f"TrainResult {self.folder}: {state} {self.iterations} iterations{rates}"

    @property
    def report(self) -> Path:
        """`report.html`, which opens without a network."""
        return self.folder / "report.html"

    @cached_property
    def policy(self) -> "Policy":
        """The policy, loaded when first asked for."""
        from reachrl.backends.policy_loading import load_policy

        return load_policy(self.policy_folder, device=self.device)
