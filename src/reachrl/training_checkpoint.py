"""What a resumed training continues from: its counters, and the state of every part, in a run's checkpoints."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reachrl.backends.base import Actors, Learner
from reachrl.config.train import TrainConfig
from reachrl.curriculum.base import TaskSampler
from reachrl.errors import CheckpointError
from reachrl.rewards.audit import RewardAudit
from reachrl.rewards.base import Reward
from reachrl.run.atomic import write_json_atomic
from reachrl.run.checkpoint import (
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from reachrl.run.directory import Run
from reachrl.types import Rollout
from reachrl.validation import ValidationCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """How far a run has come; what a resumed run continues from."""

    iteration: int = 0
    env_steps: int = 0
    episodes: int = 0
    ended_early: bool = False
    """Whether `eval.patience` ended training before the last iteration."""

    def advance(self, rollout: Rollout) -> "TrainState":
        """The state after one more iteration."""
        return replace(
            self,
            iteration=self.iteration + 1,
            env_steps=self.env_steps + rollout.num_env_steps,
            episodes=self.episodes + len(rollout.episodes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """The parts of a training whose state is in its checkpoints."""

    actors: Actors
    learner: Learner
    reward: Reward
    audit: RewardAudit
    curriculum: TaskSampler
    validation: ValidationCurve

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, JSON-ready; the learner's is in files of its own."""
        names = ("actors", "reward", "audit", "curriculum", "validation")
        return {name: getattr(self, name).state_dict() for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore each part; the actors last, as they replay the running episodes."""
        for name in ("curriculum", "audit", "reward", "validation", "actors"):
            if name in state or name != "validation":  # which checkpoints of earlier versions do not have
                getattr(self, name).load_state_dict(state[name])


def checkpoint_due(config: TrainConfig, state: TrainState) -> bool:
    """Whether a checkpoint follows the iteration that `state` is in."""
    done = state.iteration + 1
    return done % config.checkpoint_every == 0 or done == config.num_iterations


def save(run: Run, state: TrainState, checkpointed: Checkpointed, config: TrainConfig) -> None:
    """Write one complete checkpoint: weights, optimiser, running episodes, reward, curriculum, counters."""

    def fill(folder: Path) -> None:
        checkpointed.learner.save(folder)
        write_json_atomic(folder / "state.json", {"train": asdict(state)} | checkpointed.state_dict())

    there = [checkpoint_step(folder) for folder in list_checkpoints(run.checkpoints)]
    protected = checkpointed.validation.best_of(there, config.keep_best_checkpoints)
    save_checkpoint(run.checkpoints, state.iteration, fill, keep=config.keep_checkpoints, protected=protected)


def restore(run: Run, checkpointed: Checkpointed) -> TrainState:
    """The state of the last checkpoint, with everything put back; a fresh state if there is none.

    Metrics written after the checkpoint are dropped: those iterations are about to be run again.

    Raises:
        CheckpointError: the checkpoint is damaged or of another architecture.
    """
    folder = latest_checkpoint(run.checkpoints)
    if folder is None:
        _forget_after(run, -1)
        return TrainState()
    verify_checkpoint(folder, nested=False)  # a sealed policy is verified as it is read
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state = TrainState(**saved["train"])
    checkpointed.learner.load(folder, version=state.iteration)
    checkpointed.load_state_dict(saved)
    _forget_after(run, state.iteration - 1)
    return state


def saved_reward_state(run: Run) -> dict[str, Any]:
    """What the reward keeps in the run's last checkpoint, for `Reward.load_state_dict`.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = latest_checkpoint(run.checkpoints)
    if folder is None:
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint lies here; expected the last one of training, which holds the reward's "
            "state. Put it back, or train again with another --run."
        )
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))["reward"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'}: missing or damaged ({error}). Put it back, or train again with another --run."
        ) from error


def _forget_after(run: Run, iteration: int) -> None:
    run.metrics.truncate_after(("train", "validation"), "iteration", iteration)
