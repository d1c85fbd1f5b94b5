"""Refits the reward model between RL iterations on fresh episodes; the versions that checkpoints name are kept."""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reachrl.config.train import TrainConfig
from reachrl.demos.readers import read_trajectories
from reachrl.demos.shard import iter_shard, write_shard
from reachrl.demos.store import TrajectoryStore
from reachrl.rewards.episodes import whole_episodes
from reachrl.rewards.process.base import RewardModel, load_reward_model
from reachrl.rewards.process.fit import fit_reward_model, score_trajectories
from reachrl.rewards.process.label import label_trajectory
from reachrl.rewards.process.quality import measure
from reachrl.run.checkpoint import list_checkpoints
from reachrl.run.directory import Run
from reachrl.types import Rollout, Trajectory

log = logging.getLogger(__name__)


class Refitter:
    """Keeps the episodes of the last iterations and refits the reward model to them and to the first fit's data.

    Only episodes that lie whole in one rollout are kept. They are written to `reward_model/fresh/` as they come, so
    that a killed run refits to the same data.

    Args:
        config: the run's; `reward_model.refit_*` say when and how.
        run: where data and versions lie.
    """

    def __init__(self, config: TrainConfig, run: Run) -> None:
        self.config, self.run = config, run

    def __call__(
        self, rollout: Rollout, iteration: int, model: RewardModel
    ) -> tuple[RewardModel, dict[str, float]] | None:
        """Keep this rollout's episodes; when due, a refitted copy of `model` with its quality."""
        options = self.config.reward_model
        episodes = episode_trajectories(rollout)
        self._fresh(iteration).unlink(missing_ok=True)
        if episodes:
            write_shard(self._fresh(iteration), episodes)
        # A run resumed from its last checkpoint goes through the window of an earlier iteration again.
        self._fresh(iteration - options.refit_window - self.config.checkpoint_every).unlink(missing_ok=True)
        if (iteration + 1) % options.refit_every:
            return None
        version = (iteration + 1) // options.refit_every
        self._drop_old_versions()
        device = next(model.parameters()).device
        result = fit_reward_model(
            first_data(self.config, self.run) + self._recent(iteration),
            options,
            seed=self.config.seed,
            folder=version_folder(self.run, version),
            device=device,
            start_from=copy.deepcopy(model),
        )
        figures = {
            f"reward_model/{key}": value for key, value in audit_figures(self.config, self.run, result.model).items()
        }
        log.info(
            "iteration %d: reward model version %d, held-out AUC %s", iteration, version, figures["reward_model/auc"]
        )
        return result.model.to(device), {"reward_model/version": float(version)} | figures

    def _drop_old_versions(self) -> None:
        """Remove versions older than the newest that a checkpoint goes on with, but for those of other checkpoints."""
        states = [folder / "state.json" for folder in list_checkpoints(self.run.checkpoints)]
        kept = {json.loads(state.read_text(encoding="utf-8"))["reward"]["version"] for state in states}
        for folder in self.run.reward_model.glob("version_*"):
            number = folder.name.removeprefix("version_")
            if kept and number.isdigit() and int(number) < max(kept) and int(number) not in kept:
                shutil.rmtree(folder)

    def _fresh(self, iteration: int) -> Path:
        return self.run.reward_model / "fresh" / f"iteration_{iteration:06d}.parquet"

    def _recent(self, iteration: int) -> list[Trajectory]:
        first = max(0, iteration + 1 - self.config.reward_model.refit_window)
        shards = [self._fresh(number) for number in range(first, iteration + 1)]
        return [trajectory for shard in shards if shard.exists() for trajectory in iter_shard(shard)]


def version_folder(run: Run, version: int) -> Path:
    """Folder of a version of the reward model and its `quality.json`; 0 is the fit before RL."""
    return run.reward_model / f"version_{version:04d}" if version else run.reward_model


def read_version(run: Run, version: int) -> RewardModel:
    """A version of this run's reward model.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    return load_reward_model(version_folder(run, version) / "model")


def first_data(config: TrainConfig, run: Run) -> list[Trajectory]:
    """What the first fit saw: demonstrations, the warm-started policy's episodes, and what the configuration adds."""
    rollouts = run.reward_model / "rollouts" / "policy.parquet"
    data = list(TrajectoryStore(run.demos)) + (list(iter_shard(rollouts)) if rollouts.exists() else [])
    return data + [each for path in config.reward_model.trajectories for each in read_trajectories(path)]


def audit_figures(config: TrainConfig, run: Run, model: RewardModel) -> dict[str, float]:
    """Quality of a model on the audit set, the held-out trajectories of the first fit, which never change."""
    path = run.reward_model / "audit.parquet"
    if not path.exists():
        return {}
    data = list(iter_shard(path))
    labels = [label_trajectory(trajectory, config.reward_model) for trajectory in data]
    quality = measure(score_trajectories(model, data, labels))
    return {key: quality[key] for key in ("auc", "rank_correlation", "false_positive_rate") if quality[key] is not None}


def episode_trajectories(rollout: Rollout) -> list[Trajectory]:
    """The episodes that lie whole in a rollout, as trajectories without actions' values (the labels need none)."""
    trajectories: list[Trajectory] = []
    for place, first, t, n in whole_episodes(rollout):
        rows = slice(first, t + 1)
        trajectories.append(
            Trajectory(
                start=rollout.episodes[place].start.plain,
                instruction=rollout.instructions[t][n],
                images={
                    camera: np.concatenate([frames[rows, n], rollout.final_observation.images[camera][place, None]])
                    for camera, frames in rollout.images.items()
                },
                actions=rollout.token_ids[rows, n].astype(np.float32),
                ee_state=with_first_pose(rollout.ee_state[rows, n]),
                success=bool(rollout.success[t, n]),
                source="policy",
                state=with_final_state(rollout, rows, n, place),
                control_hz=None if rollout.control_hz is None else rollout.control_hz / int(rollout.executed.max()),
            )
        )
    return trajectories


def with_final_state(rollout: Rollout, rows: slice, n: int, place: int) -> np.ndarray | None:
    """States f32[T+1 S] of an episode that lies whole in a rollout; None where there are none."""
    if rollout.state is None or rollout.final_observation.state is None:
        return None
    return np.concatenate([rollout.state[rows, n], rollout.final_observation.state[place, None]])


def with_first_pose(states: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Poses f32[T+1 4] of an episode from those after each action; the first one known stands in for the one before."""
    return np.stack([states[0], *states])
