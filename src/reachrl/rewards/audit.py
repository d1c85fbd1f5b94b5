"""Alarm for reward hacking: detects when the dense reward stops going with success during RL."""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from reachrl.config.audit import AuditSection
from reachrl.report.video import write_film
from reachrl.rewards.episodes import whole_episodes
from reachrl.types import Rewards, Rollout

log = logging.getLogger(__name__)

_KEPT_FILMS = 30  # of a run, the latest; it may warn again and again


@dataclass(frozen=True, slots=True)
class AuditedEpisode:
    """A finished episode as the dense reward saw it."""

    success: bool
    score: float  # mean of the progress scores of the frames its decisions led to
    last: float  # progress score of the last of them
    earned: float  # sum of its rewards, all parts


class RewardAudit:
    """Compares the progress scores of recent episodes with their success.

    Three figures indicate a policy that exploits the reward instead of solving the task:
    failures earn more than successes (what is optimised is no longer the task), the score of an episode's last frame
    no longer goes with success (the model is fooled), and failures score more, on the mean over their frames, than
    those of the run's beginning did. The mean says nothing of success: a success ends soon, with the frames of its
    approach, where a failure near the goal goes on to the time limit.

    Args:
        config: window and thresholds.
        videos: the folder that films of the offending episodes go into.
    """

    def __init__(self, config: AuditSection, videos: Path) -> None:
        self.config, self.videos = config, videos
        self._recent: deque[AuditedEpisode] = deque(maxlen=config.window)
        self._first_failures: list[float] = []  # scores of the run's first failures, the reference of the drift
        self._open: dict[int, list[float]] = {}  # env -> [score, decisions, reward] so far of the episode it is in
        self._alarmed = False
        self._filming = ThreadPoolExecutor(1, "films")  # training does not wait for films
        self._films: list[Future[Path]] = []

    def observe(self, rollout: Rollout, rewards: Rewards, *, iteration: int) -> dict[str, float | None]:
        """Add an iteration's episodes; warn and record videos where score and success diverge.

        Args:
            rollout: what was collected.
            rewards: its rewards; without progress scores there is nothing to watch.
            iteration: named in the warning and the films.

        Returns:
            Figures for the iteration's metrics; None where the window cannot tell yet.
        """
        if rewards.progress is None:
            return {}
        self._recent.extend(self._finished(rollout, rewards.progress, rewards.total))
        figures = self._figures()
        reasons = self._reasons(figures)
        if reasons and not self._alarmed:
            films = self._film(rollout, rewards, iteration)
            seen = ", ".join(films) or "the failed episodes (none lies whole in this rollout)"
            log.warning(
                "iteration %d: the dense reward may be hacked: %s. Look at %s; then lower reward.weight, use "
                "reward.mode=potential, or refit the reward model (reward_model.refit_every)",
                iteration, "; ".join(reasons), seen,
            )  # fmt: skip
        self._alarmed = bool(reasons)
        return figures | {"audit/alarm": float(self._alarmed)}

    def finish(self) -> None:
        """Wait for the videos in the background.

        Raises:
            StorageError: one could not be written.
        """
        films, self._films = self._films, []
        for film in films:
            film.result()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "recent": [asdict(episode) for episode in self._recent],
            "first_failures": self._first_failures,
            "open": {str(env): totals for env, totals in self._open.items()},
            "alarmed": self._alarmed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._recent.clear()
        # Earlier versions noted no last score; the window fills again.
        self._recent.extend(AuditedEpisode(**episode) for episode in state["recent"] if "last" in episode)
        self._first_failures = list(state["first_failures"])
        self._open = {int(env): list(totals) for env, totals in state["open"].items()}
        self._alarmed = state["alarmed"]

    def _finished(self, rollout: Rollout, progress: np.ndarray, total: np.ndarray) -> list[AuditedEpisode]:
        """The episodes that ended in the rollout; those still running are carried on."""
        finished: list[AuditedEpisode] = []
        num_steps, num_envs = rollout.valid.shape
        for t in range(num_steps):
            for n in range(num_envs):
                if not rollout.valid[t, n]:
                    self._open.pop(n, None)  # lost with its worker
                    continue
                score, count, earned = self._open.pop(n, [0.0, 0.0, 0.0])
                score, count, earned = score + float(progress[t, n]), count + 1, earned + float(total[t, n])
                if rollout.terminated[t, n] or rollout.truncated[t, n]:
                    success, last = bool(rollout.success[t, n]), float(progress[t, n])
                    finished.append(AuditedEpisode(success, score / count, last, earned))
                else:
                    self._open[n] = [score, count, earned]
        return finished

    def _figures(self) -> dict[str, float | None]:
        failures = [episode.score for episode in self._recent if not episode.success]
        successes = [episode.score for episode in self._recent if episode.success]
        if len(self._first_failures) < self.config.min_episodes:
            self._first_failures = failures[: self.config.min_episodes]  # nothing has left the window so far
        enough = min(len(failures), len(successes)) >= self.config.min_episodes
        drift = None
        if len(failures) >= self.config.min_episodes:
            drift = float(np.mean(failures) - np.mean(self._first_failures))
        return {
            "audit/return_correlation": self._correlation("earned") if enough else None,
            "audit/score_correlation": self._correlation("last") if enough else None,
            "audit/failure_score": float(np.mean(failures)) if failures else None,
            "audit/success_score": float(np.mean(successes)) if successes else None,
            "audit/failure_drift": drift,
        }

    def _reasons(self, figures: dict[str, float | None]) -> list[str]:
        reasons: list[str] = []
        drift = figures["audit/failure_drift"]
        for what, key in (("what an episode earns", "return"), ("its last frame's progress score", "score")):
            found = figures[f"audit/{key}_correlation"]
            if found is not None and found < self.config.correlation:
                reasons.append(
                    f"over the last {len(self._recent)} episodes {what} correlates with success by {found:.2f} "
                    f"(audit.correlation={self.config.correlation:g})"
                )
        if drift is not None and drift > self.config.drift:
            reasons.append(
                f"failures score {drift:.2f} more than the run's first ones (audit.drift={self.config.drift:g})"
            )
        return reasons

    def _correlation(self, figure: str) -> float | None:
        numbers = np.array([getattr(episode, figure) for episode in self._recent])
        return correlation(numbers, np.array([episode.success for episode in self._recent]))

    def _film(self, rollout: Rollout, rewards: Rewards, iteration: int) -> list[str]:
        """Start recording videos of this rollout's failures with the highest dense reward; return the files."""
        assert rewards.progress is not None
        liked = [
            (float(rewards.progress[first : t + 1, n].mean()), place, first, t, n)
            for place, first, t, n in whole_episodes(rollout)
            if not rollout.success[t, n]
        ]
        names: list[str] = []
        earlier = sorted(self.videos.glob("alarm_iteration*_*.mp4"), key=lambda film: film.stat().st_mtime_ns)
        best = sorted(liked, reverse=True)[: self.config.num_videos]
        for film in earlier[: max(0, len(earlier) + len(best) - _KEPT_FILMS)]:
            film.unlink()
        for number, (_, place, first, t, n) in enumerate(best, start=1):
            images = np.concatenate([rollout.frames[first : t + 1, n], rollout.final_frames[place : place + 1]])
            process = rewards.progress[first : t + 1, n].tolist()
            path = self.videos / f"alarm_iteration{iteration:04d}_{number}.mp4"
            names.append(str(path))
            film = partial(
                write_film, path, images, instruction=rollout.instructions[t][n], success=False, process=process
            )
            self._films.append(self._filming.submit(film))
        return names


def correlation(numbers: Float[np.ndarray, "B"], success: Bool[np.ndarray, "B"]) -> float | None:
    """Pearson's correlation of a number with success (the point-biserial one); None where one of them never varies."""
    if len(numbers) < 2 or numbers.std() == 0 or success.std() == 0:
        return None
    return float(np.corrcoef(numbers, success)[0, 1])
