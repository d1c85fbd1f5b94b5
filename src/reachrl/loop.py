"""The loop: sync, collect, reward, score, update, log, save."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reachrl.algorithms.base import Algorithm
from reachrl.backends.base import Actors, Learner, Pending, Workers
from reachrl.config.train import TrainConfig
from reachrl.curriculum.base import TaskSampler
from reachrl.errors import ExtensionError, StopTraining
from reachrl.iteration_record import (
    metrics,
    warn_of_engine_gap,
    warn_of_lost_rollout,
    warn_of_lost_steps,
    warn_of_low_entropy,
)
from reachrl.registry import resolve
from reachrl.report.diagnosis import Explainer
from reachrl.rewards.audit import RewardAudit
from reachrl.rewards.base import Reward, check_finite
from reachrl.rollout.join import append_rewards, append_rollouts
from reachrl.run.directory import Run
from reachrl.run.metrics import records_by_kind
from reachrl.run.spans import Timelines
from reachrl.training_checkpoint import TrainState, checkpoint_due, restore, save
from reachrl.types import Rewards, Rollout
from reachrl.validation import ValidationCurve

log = logging.getLogger(__name__)


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

    The same loop runs with workers in this process or in many on a cluster. A callback may end it early: at once or,
    with `collect_ahead`, after the rollout in flight. A checkpoint is then written.

    Returns:
        How far it came: `config.num_iterations` unless a callback or `eval.patience` stopped it.

    Raises:
        DivergedError: a loss, gradient or weight is not finite; nothing of that iteration is saved.
        ExtensionError: a plug-in breaks its contract.
        WorkerError: an environment, or an actor, keeps failing.
        LearnerLostError: a process that trains is gone.
    """
    actors, learner = workers.actors, workers.learner
    audit = RewardAudit(config.audit, run.videos)
    validation = ValidationCurve(config, workers.evaluator, run.metrics.log, run.checkpoints)
    # The actors come last: they replay the running episodes.
    parts = {"curriculum": curriculum, "audit": audit, "reward": reward, "validation": validation, "actors": actors}
    state = restore(run, learner, parts)
    run.forget_spans()
    explainer = new_explainer(config, run)

    def collect() -> Pending[Rollout]:
        with run.span("sync"):
            weights = learner.export_weights()
            actors.load_weights(weights)
        with run.span("evaluate"):
            validation.begin(weights, lambda folder: learner.save_policy(folder))
        with run.span("rollout"):
            return actors.collect(curriculum.draw, config.rollout.num_steps)

    ahead: Pending[Rollout] | None = None
    stopping = ended = validation.exhausted
    timelines = Timelines()
    while state.iteration < config.num_iterations and not ended:
        collecting = ahead or collect()
        with run.span("rollout"):
            rollout = collecting.result()
        del collecting  # what it was put together from may go
        lag = learner.version - rollout.policy_version
        check_lag(config, lag, expected=0 if ahead is None else 1)
        # Nothing is collected ahead across a checkpoint: a resumed run then needs the newest weights only.
        ahead = collect() if config.collect_ahead and not (stopping or checkpoint_due(config, state)) else None
        warn_of_lost_rollout(state, rollout)
        rollout, rewards, stats = learn(config, run, state, workers, reward, curriculum, rollout)
        with run.span("watch"):
            watched = audit.observe(rollout, rewards, iteration=state.iteration)
            watched |= reward.adapt(rollout, iteration=state.iteration)
        if lag == 0:
            warn_of_engine_gap(config, state, stats)
            warn_of_lost_steps(state, stats)
        warn_of_low_entropy(state, stats)
        curriculum.observe(rollout.episodes)
        record = metrics(state, rollout, rewards, stats, curriculum) | actors.metrics() | watched | {"lag": lag}
        record = run.log(record)
        if (diagnosis := explainer.observe(record)) is not None:
            log.warning("iteration %d: %s", state.iteration, diagnosis.text())
        stopping |= asked_to_stop(callbacks, record) or validation.exhausted
        ended = stopping and ahead is None
        timelines.note(state.iteration, run.spans.take(), workers.take_spans())
        due, state = ended or checkpoint_due(config, state), state.advance(rollout)
        if due:
            validation.finish()
            audit.finish()
            run.write_timeline(*timelines.typical(ahead=config.collect_ahead), actors.balance())
            save(run, config, state, learner, parts)
            ended |= validation.exhausted
    return finish_validation(config, state, learner, validation)


def check_lag(config: TrainConfig, lag: int, *, expected: int) -> None:
    """Check that a rollout was collected with the weights that the actors were given last.

    Raises:
        ExtensionError: it was not.
    """
    if lag != expected:
        kind: str = config.backend.kind  # pyright: ignore[reportAttributeAccessIssue]
        raise ExtensionError(
            f"backend.kind={kind} gave a rollout of weights that are {lag} updates old, expected {expected}: `collect` "
            "must act with, and name, the weights that `load_weights` was given last"
        )


def new_explainer(config: TrainConfig, run: Run) -> Explainer:
    """Says why the run does not learn, if it does not; it knows what was trained before."""
    known = records_by_kind(run.metrics.path)
    demos = next(iter(known["demos"]), None)
    return Explainer(known["train"], after=config.explain_after, demos=demos, max_steps=config.env.max_steps)


def finish_validation(
    config: TrainConfig, state: TrainState, learner: Learner, validation: ValidationCurve
) -> TrainState:
    """Judge the weights that training ended with, unless a callback ended it: then it goes on another time."""
    exhausted = validation.exhausted
    if config.eval.during_every and (exhausted or state.iteration == config.num_iterations):
        validation.judge_last(learner.export_weights(), lambda folder: learner.save_policy(folder))
    if not exhausted or state.iteration == config.num_iterations:
        return state
    log.info(
        "training ends after %d of %d iterations: %d evaluations in a row were not better than those before "
        "(eval.patience)", state.iteration, config.num_iterations, config.eval.patience,
    )  # fmt: skip
    return replace(state, ended_early=True)


def learn(
    config: TrainConfig,
    run: Run,
    state: TrainState,
    workers: Workers,
    reward: Reward,
    curriculum: TaskSampler,
    rollout: Rollout,
) -> tuple[Rollout, Rewards, dict[str, float]]:
    """Reward, score and update; frames are scored by the reward while the learner scores decisions.

    Where the algorithm may want more rollouts, rewards come first.

    Returns:
        All that was learned from, its rewards, and the update's figures.
    """
    rewards, collected = None, {}
    if config.algorithm.needs.max_rollouts > 1:
        rollout, rewards, collected = fill_up(config, run, state, workers.actors, reward, curriculum, rollout)
    with run.span("score"):
        scoring = workers.learner.score(rollout)
    if rewards is None:
        rewards = rewarded(run, reward, rollout)
    with run.span("score"):
        scored = scoring.result()
    with run.span("update"):
        stats = workers.learner.update(rollout, rewards, scored, iteration=state.iteration)
    return replace(rollout, inputs=None), rewards, stats | collected


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
    actors: Actors,
    reward: Reward,
    curriculum: TaskSampler,
    rollout: Rollout,
) -> tuple[Rollout, Rewards, dict[str, float]]:
    """Add rollouts of the same weights while the algorithm wants more, up to its `max_rollouts`."""
    options, rollouts = config.algorithm, 1
    kind: str = options.kind  # pyright: ignore[reportAttributeAccessIssue]
    algorithm: type[Algorithm] = resolve("algorithms", kind)
    rewards = rewarded(run, reward, rollout)
    while wanting := algorithm.wants_more(options, rollout, rewards, rollouts=rollouts):
        if rollouts == options.needs.max_rollouts:
            break
        with run.span("rollout"):
            more = actors.collect(curriculum.draw, config.rollout.num_steps).result()
        rewards = append_rewards(rewards, rewarded(run, reward, more))
        rollout, rollouts = append_rollouts(rollout, more), rollouts + 1
    if wanting:
        log.warning(
            "iteration %d: after %d rollouts there are still fewer groups to learn from than one rollout has; those "
            "there are, are trained on", state.iteration, rollouts,
        )  # fmt: skip
    return rollout, rewards, {"rollouts": rollouts}


def asked_to_stop(callbacks: Sequence[Callback], record: dict[str, Any]) -> bool:
    """Call every callback with the iteration's record; return whether any of them ends training."""
    stop = False
    for callback in callbacks:
        try:
            answer = callback(record)
        except StopTraining:
            answer = True
        stop |= isinstance(answer, bool | np.bool_) and bool(answer)
    return stop
