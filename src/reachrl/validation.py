"""Success on validation starts during training: its curve, the best weights by it, and when to stop."""

import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from reachrl.backends.base import Evaluator, Pending, Weights
from reachrl.config.train import TrainConfig
from reachrl.evaluation import EvalResult, validation_starts
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.atomic import replace_folder_atomic, write_json_atomic
from reachrl.run.records import BestPoint, read_record

log = logging.getLogger(__name__)

BEST = "best"  # in the folder of checkpoints: `policy/` and `validation.json`
SAVED_BEST = "best_at_checkpoint"  # what BEST was at the last checkpoint, where a better one has come since
_CANDIDATE = "candidate"  # the weights whose point is under way

SavePolicy = Callable[[Path], None]


class ValidationCurve:
    """One point every `eval.during_every` versions of the weights, and one of the last.

    Choosing a checkpoint or an option by these points also selects by chance. The final evaluation is unaffected: it
    has other starts and other noise.

    Args:
        config: the run's.
        evaluator: plays the episodes; None disables the curve.
        log: takes the records.
        folder: of the checkpoints, where the weights of the best point are kept; None: they are not.
    """

    def __init__(
        self,
        config: TrainConfig,
        evaluator: Evaluator | None,
        log: Callable[[dict[str, Any]], None],
        folder: Path | None = None,
    ) -> None:
        self._config, self._evaluator, self._log, self._folder = config, evaluator, log, folder
        self._last: int | None = None
        self._pending: Pending[list[PlayedEpisode]] | None = None
        self._points: list[tuple[int, int, int]] = []  # iteration, k, n
        self._unkept = -1  # the weights of points up to this iteration are lost
        self._saved_best: int | None = None  # at the last checkpoint

    def begin(self, weights: Weights, save_policy: SavePolicy | None = None) -> None:
        """Begin a point if these weights are due; the last one is finished first."""
        every = self._config.eval.during_every
        if every and not weights.version % every:
            self._begin(weights, save_policy)

    def judge_last(self, weights: Weights, save_policy: SavePolicy | None = None) -> None:
        """Play the weights that training ends with, due or not, and wait for it."""
        self._begin(weights, save_policy)
        self.finish()

    def _begin(self, weights: Weights, save_policy: SavePolicy | None) -> None:
        if self._evaluator is None or weights.version == self._last:
            return
        self.finish()
        self._last = weights.version
        if self._folder is not None and save_policy is not None:
            replace_folder_atomic(self._folder / _CANDIDATE, lambda aside: save_policy(aside / "policy"))
        options = self._config.eval
        self._pending = self._evaluator.play(weights, validation_starts(self._config.env, options), options.modes[0])

    def finish(self) -> None:
        """Wait for the point that is under way, log it, and keep its weights if they are the best so far."""
        if self._pending is None:
            return
        mode = self._config.eval.modes[0]
        record = EvalResult(mode=mode, episodes=tuple(self._pending.result())).record()
        self._pending = None
        figures = {key: value for key, value in record.items() if key != "episodes"}
        figures = {"iteration": self._last, "mode": mode} | figures
        self._log({"kind": "validation"} | figures)
        assert self._last is not None
        self._points.append((self._last, record["k"], record["n"]))
        if self.best == self._last:
            self._keep(figures)

    def _keep(self, figures: dict[str, Any]) -> None:
        if self._folder is None or not (self._folder / _CANDIDATE / "policy").is_dir():
            return
        policy = self._folder / _CANDIDATE / "policy"

        def fill(aside: Path) -> None:
            write_json_atomic(aside / "validation.json", figures)
            policy.rename(aside / "policy")

        saved = self._folder / SAVED_BEST
        if self._saved_best is not None and not saved.exists() and _iteration(self._folder / BEST) == self._saved_best:
            (self._folder / BEST).rename(saved)  # a resume from the checkpoint finds it
        replace_folder_atomic(self._folder / BEST, fill)
        policy.parent.rmdir()

    def checkpointed(self) -> None:
        """A checkpoint holds the points so far: an earlier best is needed no more."""
        self._saved_best = self.best
        if self._folder is not None:
            shutil.rmtree(self._folder / SAVED_BEST, ignore_errors=True)

    def resume(self) -> None:
        """Go back to the weights that were best at the checkpoint: what was kept after it is about to be trained again.

        Where they are not there (a branch of another run, a deleted folder), the best is chosen among later points.
        """
        if self._folder is None:
            return
        kept, saved = self._folder / BEST, self._folder / SAVED_BEST
        if self.best is None or _iteration(kept) != self.best:
            shutil.rmtree(kept, ignore_errors=True)
            if self.best is not None and _iteration(saved) == self.best:
                saved.rename(kept)
        shutil.rmtree(saved, ignore_errors=True)
        if self.best is not None and not kept.exists():
            log.warning(
                "the weights after iteration %d, the best on validation starts, do not lie in %s: the best is chosen "
                "among later ones", self.best, kept,
            )  # fmt: skip
            self._unkept = self._points[-1][0]
        self._saved_best = self.best

    @property
    def best(self) -> int | None:
        """The version with the highest rate, the latest of equal ones; None before the first point.

        It is the one whose weights `checkpoints/best` holds; points whose weights are lost do not count.
        """
        points = [point for point in self._points if point[0] > self._unkept]
        return max(points, key=lambda point: (_rate(point), point[0]))[0] if points else None

    @property
    def exhausted(self) -> bool:
        """Whether `eval.patience` points in a row were not better than all before them; a later one changes nothing."""
        patience = self._config.eval.patience
        return patience is not None and longest_wait([_rate(point) for point in self._points]) >= patience

    def best_of(self, steps: Collection[int], count: int) -> set[int]:
        """Those of `steps` that have the highest rates, at most `count`; steps without a point have none."""
        judged = sorted((_rate(point), point[0]) for point in self._points if point[0] in steps)
        return {step for _, step in judged[max(0, len(judged) - count) :]}

    def state_dict(self) -> dict[str, Any]:
        """The points so far, JSON-ready; one that is under way is played again."""
        return {"points": [list(point) for point in self._points], "unkept": self._unkept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self._points = [(iteration, k, n) for iteration, k, n in state["points"]]
        self._unkept = state.get("unkept", -1)  # which earlier versions do not have


def longest_wait(rates: Collection[float]) -> int:
    """The most rates in a row that have not exceeded the highest before them."""
    best, since, longest = float("-inf"), 0, 0
    for rate in rates:
        best, since = (rate, 0) if rate > best else (best, since + 1)
        longest = max(longest, since)
    return longest


def _iteration(folder: Path) -> int | None:
    """Which point the weights in a folder are of; None where there are none."""
    if not (folder / "policy").is_dir() or not (folder / "validation.json").exists():
        return None
    return read_record(folder / "validation.json", BestPoint, remedy=f"delete {folder}")["iteration"]


def _rate(point: tuple[int, int, int]) -> float:
    _, k, n = point
    return k / n if n else 0.0
