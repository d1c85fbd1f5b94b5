"""One attempt of a scripted expert, and the worker process (`reachrl.demos.expert`) that makes attempts on request."""

import copy
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa

from reachrl.child import pipe_to_parent
from reachrl.config.demos import DemosSection
from reachrl.demos.shard import trajectory_table
from reachrl.envs.base import Env, Shown
from reachrl.errors import ConfigError, ExtensionError, ReachRLError
from reachrl.registry import build, receive, section_class
from reachrl.streams import Stream, generator
from reachrl.types import Start, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """A worker's first message; options as plain dicts, validated again by the section of `kind`."""

    kind: str
    code: str | None  # the class, where `kind` cannot be imported: `registry.send`
    env: dict[str, Any]
    demos: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """The `number`-th attempt at a task; numbers beyond the start states go round them again with other noise."""

    task: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """What a worker says once its simulator stands."""

    tasks: tuple[str, ...]
    num_starts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailure:
    """An exception in a worker, as text; `error` is set when it is one that a user is shown."""

    text: str
    error: ReachRLError | None


def noise_generator(seed: int, attempt: Attempt) -> np.random.Generator:
    """The stream of one attempt's noise; it depends on nothing else, so neither does the episode."""
    return generator(seed, Stream.EXPERT_NOISE, attempt.task, attempt.number)


def run_attempt(
    env: Env, start: Start, config: DemosSection, rng: np.random.Generator, on_step: Callable[[int], None] | None = None
) -> Trajectory:
    """Run one episode: execute the expert's action with noise, record it without.

    Args:
        env: the simulator.
        start: where the episode begins.
        config: noise and its probability.
        rng: the source of the noise; every step draws the same amount whatever the options.
        on_step: called with the number of steps done.

    Returns:
        The episode, `actions` being the clean actions clipped to the action space.

    Raises:
        ConfigError: the simulator has no expert.
        ExtensionError: an action or an end-effector state is not finite; names the start and the step.
    """
    shown = Shown.of(env.observation_space)
    low, high = env.action_space.low, env.action_space.high  # pyright: ignore[reportAttributeAccessIssue]
    observation, _ = env.reset(options={"start": start})  # pyright: ignore[reportGeneralTypeIssues]
    _check_finite(observation["ee_state"], "ee_state", env, start, 0)
    seen, actions = [copy.deepcopy(observation)], []
    success = done = False
    while not done:
        clean = np.clip(np.asarray(_expert_action(env, start), np.float32), low, high)
        _check_finite(clean, "the expert's action", env, start, len(actions))
        noise, use = rng.standard_normal(clean.shape), rng.random() < config.noise_probability
        executed = clean + use * config.action_noise * 0.5 * (high - low) * noise
        observation, _, terminated, truncated, info = env.step(np.clip(executed, low, high).astype(np.float32))
        seen.append(copy.deepcopy(observation))
        _check_finite(observation["ee_state"], "ee_state", env, start, len(actions))
        actions.append(clean)
        success, done = bool(info["success"]), terminated or truncated
        if on_step is not None:
            on_step(len(actions))
    return Trajectory(
        start=start,
        instruction=env.instruction(start.task),
        images={camera: np.stack([each["images"][camera] for each in seen]) for camera in shown.cameras},
        actions=np.stack(actions).astype(np.float32),
        ee_state=np.stack([each["ee_state"] for each in seen]).astype(np.float32),
        success=success,
        source="expert",
        state=None if shown.state_size is None else np.stack([each["state"] for each in seen]).astype(np.float32),
        control_hz=env.control_hz,
    )


def _check_finite(values: np.ndarray, what: str, env: Env, start: Start, step: int) -> None:
    """Refuse numbers that are not finite: no demonstration holds them."""
    if not np.isfinite(values).all():
        raise ExtensionError(
            f"demos: {type(env).__name__}, task {start.task!r}, {start.split} start {start.index}, step {step}: {what} "
            f"is {np.asarray(values).tolist()}; expected finite numbers."
        )


def _expert_action(env: Env, start: Start) -> np.ndarray:
    try:
        return env.expert_action()
    except NotImplementedError as error:
        raise ConfigError(
            f"demos: {type(env).__name__} has no scripted expert for task {start.task!r} (`expert_action` raises "
            "NotImplementedError), so there is nobody to demonstrate it. Train without demonstrations: set "
            "policy.checkpoint and sft.epochs=0, and a reward for which no model is fitted (reward.kind=task, or "
            "reward.checkpoint)."
        ) from error


def serve(pipe: Connection) -> None:
    """Make attempts until told to stop (None) or the parent goes away.

    Takes a `WorkerSetup` and sends `WorkerReady`; then for each `Attempt` the number of each step done (its heartbeat)
    and at the end `("done", table)`, the table being None without success. `WorkerFailure` replaces any of these.
    """
    env: Env | None = None
    try:
        setup: WorkerSetup = pipe.recv()
        config = DemosSection.model_validate(setup.demos)
        receive(setup.kind, setup.code)
        env = build("envs", section_class("envs", setup.kind).model_validate(setup.env))
        assert env is not None
        num_starts = env.num_starts("train")
        pipe.send(WorkerReady(tasks=tuple(env.tasks), num_starts=num_starts))
        while (attempt := pipe.recv()) is not None:
            start = Start(attempt.task, "train", attempt.number % num_starts)
            trajectory = run_attempt(env, start, config, noise_generator(setup.seed, attempt), pipe.send)
            table: pa.Table | None = trajectory_table(trajectory) if trajectory.success else None
            pipe.send(("done", table))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has gone; nobody is left to tell
    except Exception as error:
        shown = error if isinstance(error, ReachRLError) else None
        pipe.send(WorkerFailure(text=traceback.format_exc(), error=shown))
    finally:
        if env is not None:
            env.close()


def main() -> None:
    """Entry point of the worker process."""
    serve(pipe_to_parent())
    os._exit(0)  # GL libraries complain when Python tears them down


if __name__ == "__main__":
    # Messages name classes by module: what is sent from here must not come from `__main__`.
    from reachrl.demos.expert import main as imported_main

    imported_main()
