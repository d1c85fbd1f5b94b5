"""The loop: sync, collect, reward, score, update, log, save."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.algorithms.base import Algorithm, Stats
from reachrl.backends.base import Actors, Learner, Pending, Workers
from reachrl.config.train import TrainConfig
from reachrl.curriculum.base import TaskSampler
from reachrl.errors import CheckpointError, ExtensionError, StopTraining
from reachrl.evaluation import ValidationCurve
from reachrl.functional.stats import weighted_rate
from reachrl.registry import resolve
from reachrl.rewards.audit import RewardAudit
from reachrl.rewards.base import Reward, check_finite
from reachrl.rollout.join import append_rewards, append_rollouts
from reachrl.run.atomic import write_json_atomic
from reachrl.run.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint
from reachrl.run.directory import Run
from reachrl.run.spans import Timelines
from reachrl.run.weight_change import ALARM
from reachrl.types import Episode, Rewards, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """How far a run has come; what a resumed run continues from."""

    iteration: int = 0
    env_steps: int = 0
    episodes: int = 0

    def advance(self, rollout: Rollout) -> "TrainState":
        """The state after one more iteration."""
        return replace(
            self,
            iteration=self.iteration + 1,
            env_steps=self.env_steps + rollout.num_env_steps,
            episodes=self.episodes + len(rollout.episodes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepers:
    """Everyone who keeps something that a resumed run needs."""

    actors: Actors
    learner: Learner
    reward: Reward
    audit: RewardAudit
    curriculum: TaskSampler

    def state_dict(self) -> dict[str, Any]:
        """What each needs to go on, JSON-ready; the learner writes files of its own."""
        return {name: getattr(self, name).state_dict() for name in ("actors", "reward", "audit", "curriculum")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let each go on from there; the actors last, as they replay the running episodes."""
        for name in ("curriculum", "audit", "reward", "actors"):
            getattr(self, name).load_state_dict(state[name])


Callback = Callable[[dict[str, Any]], object]
"""Called after every iteration with its record of `metrics.jsonl`, in this process, while nothing is being trained.

Where it returns `True` or raises `StopTraining`, training ends with a checkpoint, from which the same run goes on
later; other answers mean nothing. Any other exception ends the run as a kill would: the last checkpoint stays.
"""


def train(
    config: TrainConfig,
    workers: Workers,
    reward: Reward,
    curriculum: TaskSampler,
    run: Run,
    callbacks: Sequence[Callback] = (),
) -> TrainState:
    """Improve one policy online, from the run's last checkpoint if it has one.

    The same loop whoever the workers are and wherever: this process, or many on a cluster. A callback may end it early,
    at once, or with `collect_ahead` after the one rollout that is under way; a checkpoint is written then too.

    Returns:
        How far it came: `config.num_iterations` unless a callback stopped it.

    Raises:
        DivergedError: a loss, gradient or weight is not finite; nothing of that iteration is saved.
        ExtensionError: a plug-in breaks its contract.
        WorkerError: an environment, or an actor, keeps failing.
        LearnerLostError: a process that trains is gone.
    """
    actors, learner = workers.actors, workers.learner
    audit = RewardAudit(config.audit, run.videos)
    keepers = Keepers(actors=actors, learner=learner, reward=reward, audit=audit, curriculum=curriculum)
    state = restore(run, keepers)
    run.forget_spans()
    validation = ValidationCurve(config, workers.evaluator, run.metrics.log)

    def collect() -> Pending[Rollout]:
        with run.span("sync"):
            weights = learner.export_weights()
            actors.load_weights(weights)
        with run.span("evaluate"):
            validation.begin(weights)
        with run.span("rollout"):
            return actors.collect(curriculum.draw, config.rollout.num_steps)

    ahead: Pending[Rollout] | None = None
    stopping = ended = False
    timelines = Timelines()
    while state.iteration < config.num_iterations and not ended:
        collecting = ahead or collect()
        with run.span("rollout"):
            rollout = collecting.result()
        del collecting  # what it was put together from may go
        lag = learner.version - rollout.policy_version
        if lag != (expected := 0 if ahead is None else 1):
            raise ExtensionError(
                f"backend.kind={config.backend.kind} gave a rollout of weights that are {lag} updates old, expected "  # pyright: ignore
                f"{expected}: `collect` must act with, and name, the weights that `load_weights` was given last"
            )
        # A checkpoint finds nobody collecting: what is resumed then needs the newest weights only.
        ahead = collect() if config.collect_ahead and not (stopping or checkpoint_due(config, state)) else None
        if not rollout.num_env_steps:
            log.warning(
                "iteration %d: nothing to train on, every environment was lost in every step; see the workers' logs",
                state.iteration,
            )
        rollout, rewards, stats = learn(config, run, state, workers, reward, rollout, curriculum)
        with run.span("watch"):
            watched = audit.observe(rollout, rewards, iteration=state.iteration)
            watched |= reward.adapt(rollout, iteration=state.iteration)
        if lag == 0:
            warn_of_engine_gap(config, state, stats)
            warn_of_lost_steps(state, stats)
        curriculum.observe(rollout.episodes)
        record = metrics(state, rollout, rewards, stats, curriculum) | actors.metrics() | watched | {"lag": lag}
        stopping |= asked_to_stop(callbacks, run.log(record))
        ended = stopping and ahead is None
        timelines.note(state.iteration, run.spans.take(), workers.take_spans())
        due, state = ended or checkpoint_due(config, state), state.advance(rollout)
        if due:
            validation.finish()
            audit.finish()
            run.write_timeline(*timelines.typical(ahead=config.collect_ahead), actors.balance())
            save(run, state, keepers, keep=config.keep_checkpoints)
    return state


def learn(
    config: TrainConfig,
    run: Run,
    state: TrainState,
    workers: Workers,
    reward: Reward,
    rollout: Rollout,
    curriculum: TaskSampler,
) -> tuple[Rollout, Rewards, Stats]:
    """Reward, score and update; frames are scored by the reward while the learner scores decisions.

    Where the algorithm may want more rollouts, rewards come first.

    Returns:
        All that was learned from, its rewards, and the update's figures.
    """
    learner, options = workers.learner, config.algorithm
    rewards, collected = None, {}
    if options.needs.max_rollouts > 1:
        rewards = rewarded(run, reward, rollout)
        rollout, rewards, collected = fill_up(config, run, state, workers, reward, rollout, rewards, curriculum)
    with run.span("score"):
        scoring = learner.score(rollout)
    if rewards is None:
        rewards = rewarded(run, reward, rollout)
    with run.span("score"):
        scored = scoring.result()
    with run.span("update"):
        stats = learner.update(rollout, rewards, scored, iteration=state.iteration)
    return rollout, rewards, stats | collected


def rewarded(run: Run, reward: Reward, rollout: Rollout) -> Rewards:
    """The reward of every step.

    Raises:
        ExtensionError: one is not finite.
    """
    with run.span("reward"):
        rewards = reward(rollout)
        check_finite(rewards, rollout, type(reward).__name__)
    return rewards


def fill_up(
    config: TrainConfig,
    run: Run,
    state: TrainState,
    workers: Workers,
    reward: Reward,
    rollout: Rollout,
    rewards: Rewards,
    curriculum: TaskSampler,
) -> tuple[Rollout, Rewards, Stats]:
    """Add rollouts of the same weights while the algorithm wants more, up to its `max_rollouts`."""
    options, rollouts = config.algorithm, 1
    kind: str = options.kind  # pyright: ignore[reportAttributeAccessIssue]
    algorithm: type[Algorithm] = resolve("algorithms", kind)
    while wanting := algorithm.wants_more(options, rollout, rewards, rollouts=rollouts):
        if rollouts == options.needs.max_rollouts:
            break
        with run.span("rollout"):
            more = workers.actors.collect(curriculum.draw, config.rollout.num_steps).result()
        rewards = append_rewards(rewards, rewarded(run, reward, more))
        rollout, rollouts = append_rollouts(rollout, more), rollouts + 1
    if wanting:
        log.warning(
            "iteration %d: after %d rollouts there are still fewer groups to learn from than one rollout has; those "
            "there are, are trained on", state.iteration, rollouts,
        )  # fmt: skip
    return rollout, rewards, {"rollouts": rollouts}


def asked_to_stop(callbacks: Sequence[Callback], record: dict[str, Any]) -> bool:
    """Whether any callback ends training after the iteration of this record; each of them hears of it."""
    stop = False
    for callback in callbacks:
        try:
            answer = callback(record)
        except StopTraining:
            answer = True
        stop |= isinstance(answer, bool | np.bool_) and bool(answer)
    return stop


def checkpoint_due(config: TrainConfig, state: TrainState) -> bool:
    """Whether a checkpoint follows the iteration that `state` is in."""
    done = state.iteration + 1
    return done % config.checkpoint_every == 0 or done == config.num_iterations


def warn_of_engine_gap(config: TrainConfig, state: TrainState, stats: Stats) -> None:
    """Say so when the sampler's log-probs part from the learner's: the ratio then rests on the wrong policy."""
    gap, alarm = stats["engine_kl"], config.rollout.engine_kl_alarm
    if gap > alarm:
        log.warning(
            "iteration %d: sampler and learner log-probs differ (engine_kl %.4f > %.4f); check that both use the "
            "same weights, temperature and numeric format, or set algorithm.importance_cap",
            state.iteration, gap, alarm,
        )  # fmt: skip


def warn_of_lost_steps(state: TrainState, stats: Stats) -> None:
    """Say so when steps are rounded away instead of changing the weights."""
    for name, share in (("policy", stats.get("changed_weights")), ("critic", stats.get("value_changed_weights"))):
        if share is not None and share < ALARM:  # of NaN there is nothing to say
            log.warning(
                "iteration %d: the last step changed %.0f %% of the %s's weights that had a gradient; the rest was "
                "rounded away. Raise its learning rate, or hold its weights in float32",
                state.iteration, 100 * share, name,
            )  # fmt: skip


def metrics(
    state: TrainState,
    rollout: Rollout,
    rewards: Rewards,
    stats: Stats,
    curriculum: TaskSampler,
) -> dict[str, Any]:
    """One iteration's line of `metrics.jsonl`."""
    episodes, valid = rollout.episodes, rollout.valid
    num_valid = max(int(valid.sum()), 1)
    return (
        {
            "kind": "train",
            "iteration": state.iteration,
            "env_steps": state.env_steps + rollout.num_env_steps,
            "episodes": state.episodes + len(episodes),
            "success_k": sum(episode.success for episode in episodes),
            "success_n": len(episodes),
            "success": sum(episode.success for episode in episodes) / len(episodes) if episodes else None,
            "episode_length": float(np.mean([e.num_steps for e in episodes])) if episodes else None,
        }
        | {f"reward/{name}": float(part[valid].sum()) / num_valid for name, part in rewards.parts.items()}
        | stats
        | uniform_success(episodes, curriculum)
        | curriculum.metrics()
    )


def uniform_success(episodes: Sequence[Episode], curriculum: TaskSampler) -> dict[str, float | None]:
    """Success as if every (task, training start) had been drawn equally often, whatever the curriculum preferred.

    Each episode weighs 1 / (number of starts x its chance of being drawn), so a policy that stands still has the
    same expected figure whatever the curriculum asks for. All None where a chance is unknown or no episode ended.

    Returns:
        `success_uniform`, the sum of the weights (to pool iterations by), and the effective number of episodes.
    """
    names = ("success_uniform", "success_uniform_weight", "success_uniform_n")
    chances = [episode.chance for episode in episodes if episode.chance is not None]
    if not episodes or len(chances) < len(episodes):
        return dict.fromkeys(names)
    units = len(curriculum.tasks) * curriculum.num_starts
    weights = [1 / (units * chance) for chance in chances]
    rate, effective = weighted_rate([episode.success for episode in episodes], weights)
    return dict(zip(names, (rate, sum(weights), effective), strict=True))


def save(run: Run, state: TrainState, keepers: Keepers, *, keep: int) -> None:
    """Write one complete checkpoint: weights, optimiser, running episodes, reward, curriculum, counters."""

    def fill(folder: Path) -> None:
        keepers.learner.save(folder)
        write_json_atomic(folder / "state.json", {"train": asdict(state)} | keepers.state_dict())

    save_checkpoint(run.checkpoints, state.iteration, fill, keep=keep)


def restore(run: Run, keepers: Keepers) -> TrainState:
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
    keepers.learner.load(folder, version=state.iteration)
    keepers.load_state_dict(saved)
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
    for kind in ("train", "validation"):
        run.metrics.truncate_after(kind, "iteration", iteration)
