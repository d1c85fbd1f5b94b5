"""Stages `reward` and `train`: fit the process reward model, then improve the policy with it."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reachrl.backends.base import Backend
from reachrl.backends.policy_loading import device_of, saved_policy
from reachrl.config.reward import OracleRewardConfig, ProcessRewardConfig, TaskRewardConfig
from reachrl.config.train import TrainConfig
from reachrl.demos.shard import write_shard
from reachrl.envs.vector import open_envs
from reachrl.errors import ExtensionError, LearnerLostError, StopTraining
from reachrl.loop import Callback, train
from reachrl.pipeline.base import Display, StageProgress
from reachrl.pipeline.refit import Refitter, first_data, read_version, with_first_pose
from reachrl.pipeline.resumption import forget_results
from reachrl.registry import build, resolve
from reachrl.rewards.base import Reward
from reachrl.rewards.process.base import load_reward_model
from reachrl.rewards.process.fit import fit_reward_model, split_starts
from reachrl.rewards.process.scorer import FrameScoring
from reachrl.rollout.acting import actions_executed
from reachrl.rollout.episodes import EpisodePlayer, PlayedEpisode
from reachrl.run.atomic import replace_folder_atomic
from reachrl.run.checkpoint import checkpoint_step, latest_checkpoint
from reachrl.run.directory import Run
from reachrl.training_checkpoint import TrainState, saved_reward_state
from reachrl.types import Start, Trajectory

log = logging.getLogger(__name__)


def run_reward(config: TrainConfig, run: Run, display: Display) -> dict[str, Any]:
    """Fit the process reward model on demonstrations and on the warm-started policy's own episodes."""
    if not config.fits_reward_model:
        display.log("reward: nothing to fit, the reward is the task's own or brings its checkpoint")
        return {"fitted": False}
    resolve("reward_models", config.reward_model.kind).check(config.reward_model)
    policy_trajectories(config, run, display)
    trajectories = first_data(config, run)
    with display.stage("reward", config.reward_model.steps, "fitting P(progress)") as progress:
        last = 0

        def show(step: int, record: dict[str, float]) -> None:
            nonlocal last
            run.log({"kind": "reward_model", "step": step} | record)
            progress.advance(step - last, **record)
            last = step

        run.metrics.truncate_after("reward_model", "step", 0)  # of a fit that was cut short
        result = fit_reward_model(
            trajectories,
            config.reward_model,
            seed=config.seed,
            folder=run.reward_model,
            on_step=show,
            device=device_of(config),
        )
    heldout = split_starts(trajectories, config.reward_model.heldout_fraction, config.seed)
    write_shard(
        run.reward_model / "audit.parquet", [trajectory for trajectory in trajectories if trajectory.start in heldout]
    )
    return {"fitted": True, "trajectories": len(trajectories)} | {
        key: value for key, value in result.quality["heldout"].items() if isinstance(value, int | float)
    }


def policy_trajectories(config: TrainConfig, run: Run, display: Display) -> None:
    """Play episodes of the warm-started policy on training starts into `reward_model/rollouts/`.

    The last numbered starts are used: demonstrations took the first. Actions are sampled as in training, at
    `rollout.temperature`: the model is to know the frames that training will show it.
    """
    count = config.reward_model.rollouts_per_task
    if count == 0:
        return
    policy = saved_policy(config, run.sft / "policy").eval()
    numbers = range(config.env.num_train_starts - count, config.env.num_train_starts)
    starts = [Start(task, "train", index) for index in numbers for task in config.env.tasks]
    with open_envs(config.env, config.env.num_envs) as envs:
        player = EpisodePlayer(policy, envs, mode="sampled", temperature=config.rollout.temperature, seed=config.seed)
        with display.stage("reward", len(starts), "episodes of the warm-started policy") as progress:
            episodes = player.play(starts, record=lambda _: True, on_episode=lambda _: progress.advance(1))
        chunk = actions_executed(policy, envs)
    shard = run.reward_model / "rollouts" / "policy.parquet"
    write_shard(shard, [_trajectory(episode, chunk) for episode in episodes])


def build_reward(config: TrainConfig, run: Run, *, scoring: FrameScoring | None = None) -> Reward:
    """The configured reward as training begins with it; the process reward with this run's model unless it names one.

    Args:
        config: the run's.
        run: where its reward models are.
        scoring: who runs the model; None: this process.

    Raises:
        ExtensionError: a plug-in that is no `Reward`.
    """
    shaping = {"gamma": config.algorithm.discount, "bootstrap_truncated": config.algorithm.bootstraps_truncated}
    if isinstance(config.reward, OracleRewardConfig):
        return build("rewards", config.reward, **shaping)
    if isinstance(config.reward, TaskRewardConfig):
        return build("rewards", config.reward, gamma=config.algorithm.discount)
    if not isinstance(config.reward, ProcessRewardConfig):
        reward = build("rewards", config.reward)
        if not isinstance(reward, Reward):
            raise ExtensionError(
                f"{type(reward).__name__}: a reward must be a subclass of reachrl.rewards.base.Reward."
            )
        return reward
    if config.reward.weight == 0:
        return build("rewards", config.reward, **shaping)
    # Where others run the model, ours is what they get copies of.
    device = device_of(config) if scoring is None else torch.device("cpu")
    brought = config.reward.checkpoint
    model = read_version(run, 0) if brought is None else load_reward_model(brought)
    return build(
        "rewards",
        config.reward,
        **shaping,
        model=model.to(device),
        refit=Refitter(config, run) if config.reward_model.refit_every else None,
        scoring=scoring,
        read_version=lambda number: read_version(run, number).to(device),
    )


def trained_reward(config: TrainConfig, run: Run) -> Reward:
    """The configured reward in its state at the end of training: the reward model's last version, the running scale.

    Raises:
        CheckpointError: the last checkpoint, which knows that, is missing or damaged.
    """
    reward = build_reward(config, run)
    reward.load_state_dict(saved_reward_state(run))
    return reward


def _showing(progress: StageProgress) -> Callback:
    """Callback that shows each iteration's metrics on a progress bar."""

    def show(record: dict[str, Any]) -> None:
        uniform = record["success_uniform"]
        progress.advance(
            1,
            success=f"{record['success_k']}/{record['success_n']}",
            success_uniform=None if uniform is None else f"{100 * uniform:.0f}%",
            policy="warming up the critic" if record.get("warming_up") else None,
            kl=record.get("kl"),  # none while only a critic trains
            ev=record.get("explained_variance"),
        )

    return show


def run_train(config: TrainConfig, run: Run, display: Display, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train the warm-started policy; the result is written to `policy/`.

    Raises:
        StopTraining: a callback ended it early; the stage is unfinished and goes on from its checkpoint.
    """
    forget_results(run.path)
    backend: Backend = build("backends", config.backend)
    lost = 0
    while True:
        latest = latest_checkpoint(run.checkpoints)
        done = 0 if latest is None else checkpoint_step(latest)
        try:
            with display.stage("train", config.num_iterations, "online RL", completed=done) as progress:
                state = _train_once(config, backend, run, [_showing(progress), *callbacks])
                if state.iteration < config.num_iterations and not state.ended_early:
                    raise StopTraining(
                        f"a callback ended training after {state.iteration} of {config.num_iterations} iterations"
                    )
            return {
                "iterations": state.iteration,
                "env_steps": state.env_steps,
                "episodes": state.episodes,
                "ended_early": state.ended_early,
            }
        except LearnerLostError as error:
            lost += 1
            if lost > backend.max_restarts:
                raise
            log.warning("%s; going on from it with new processes (%d of %d times)", error, lost, backend.max_restarts)


def _train_once(config: TrainConfig, backend: Backend, run: Run, callbacks: Sequence[Callback]) -> TrainState:
    """Train from the last checkpoint with one set of workers; write the final policy to `policy/`."""
    curriculum = build(
        "curricula", config.curriculum, tasks=config.env.tasks, num_starts=config.env.num_train_starts, seed=config.seed
    )
    with backend.open(config, run.sft / "policy") as workers:
        reward = build_reward(config, run, scoring=workers.scoring)
        state = train(config, workers, reward, curriculum, run, callbacks)
        if state.iteration == config.num_iterations or state.ended_early:
            replace_folder_atomic(run.policy, workers.learner.save_policy)
    return state


def _trajectory(episode: PlayedEpisode, chunk: int) -> Trajectory:
    """One frame for each decision of `chunk` actions, the last of which is repeated where the episode ended before."""
    seen = episode.observations()
    chunks = [turn.actions[np.minimum(np.arange(chunk), len(turn.actions) - 1)] for turn in episode.turns]
    return Trajectory(
        start=episode.start,
        instruction=episode.instruction,
        images=seen.images,
        state=seen.state,
        control_hz=None if episode.control_hz is None else episode.control_hz / chunk,
        actions=np.stack(chunks).reshape(len(chunks), -1),
        ee_state=with_first_pose([turn.ee_state for turn in episode.turns]),
        success=episode.success,
        source="policy",
    )
