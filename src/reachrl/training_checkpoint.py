"""What a resumed training continues from: its counters, and the state of every part, in a run's checkpoints."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reachrl.backends.base import Learner
from reachrl.config.train import TrainConfig
from reachrl.errors import CheckpointError
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


def checkpoint_due(config: TrainConfig, state: TrainState) -> bool:
    """Whether a checkpoint follows the iteration that `state` is in."""
    done = state.iteration + 1
    return done % config.checkpoint_every == 0 or done == config.num_iterations


def save(run: Run, config: TrainConfig, state: TrainState, learner: Learner, parts: Mapping[str, Any]) -> None:
    """Write one complete checkpoint: weights, optimiser, running episodes, reward, curriculum, counters.

    Args:
        run: its folder.
        config: the run's.
        state: its counters.
        learner: writes files of its own.
        parts: whatever else has a `state_dict` (JSON-ready), by name, the `ValidationCurve` as `validation`.
    """

    def fill(folder: Path) -> None:
        learner.save(folder)
        states = {name: part.state_dict() for name, part in parts.items()}
        write_json_atomic(folder / "state.json", {"train": asdict(state)} | states)

    there = [checkpoint_step(folder) for folder in list_checkpoints(run.checkpoints)]
    protected = parts["validation"].best_of(there, config.keep_best_checkpoints)
    save_checkpoint(run.checkpoints, state.iteration, fill, keep=config.keep_checkpoints, protected=protected)
    parts["validation"].checkpointed()


def restore(run: Run, learner: Learner, parts: Mapping[str, Any]) -> TrainState:
    """The counters of the last checkpoint, with everything put back; fresh ones if there is none.

    Metrics written after the checkpoint are dropped: those iterations are about to be run again.

    Args:
        run: its folder.
        learner: reads its own files.
        parts: as for `save`, in the order in which they are restored.

    Raises:
        CheckpointError: the checkpoint is damaged, of another architecture or of another version.
    """
    folder = latest_checkpoint(run.checkpoints)
    if folder is None:
        _forget_after(run, -1)
        parts["validation"].resume()
        return TrainState()
    verify_checkpoint(folder, nested=False)  # a sealed policy is verified as it is read
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    with _of_this_version(folder, "counters"):
        state = TrainState(**saved["train"])
    with _of_this_version(folder, "learner"):
        learner.load(folder, version=state.iteration)
    for name, part in parts.items():
        if name in saved or name != "validation":  # which checkpoints of earlier versions do not have
            with _of_this_version(folder, name):
                part.load_state_dict(saved[name])
    parts["validation"].resume()
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


@contextmanager
def _of_this_version(folder: Path, name: str) -> Iterator[None]:
    """Refuse the state of a part that lacks what this version keeps there, or holds what it does not know."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: the state of the {name} is that of another version of reachrl, or of another extension "
            f"({type(error).__name__}: {error}). Go on with the commit that {folder.parents[1] / 'provenance.json'} "
            f"names, or begin a new run from this policy: reachrl train --from {folder} --run NEW"
        ) from error


def _forget_after(run: Run, iteration: int) -> None:
    run.metrics.truncate_after(("train", "validation"), "iteration", iteration)
