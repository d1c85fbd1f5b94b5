"""One attempt of a scripted expert, and the worker process that makes attempts on request."""

import os
import threading
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection

import numpy as np
import pyarrow as pa

from reachrl.config.base import Section
from reachrl.config.demos import DemosSection
from reachrl.demos.store import trajectory_table
from reachrl.envs.base import Env
from reachrl.errors import ReachRLError
from reachrl.registry import resolve
from reachrl.types import Start, Trajectory


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
    return np.random.default_rng([seed, zlib.crc32(attempt.task.encode()), attempt.number])


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
    """
    low, high = env.action_space.low, env.action_space.high  # pyright: ignore[reportAttributeAccessIssue]
    observation, _ = env.reset(options={"start": start})  # pyright: ignore[reportGeneralTypeIssues]
    images, ee_states, actions = [observation["image"].copy()], [observation["ee_state"].copy()], []
    success = done = False
    while not done:
        clean = np.clip(np.asarray(env.expert_action(), np.float32), low, high)
        noise, use = rng.standard_normal(clean.shape), rng.random() < config.noise_probability
        executed = clean + use * config.action_noise * 0.5 * (high - low) * noise
        observation, _, terminated, truncated, info = env.step(np.clip(executed, low, high).astype(np.float32))
        images.append(observation["image"].copy())
        ee_states.append(observation["ee_state"].copy())
        actions.append(clean)
        success, done = bool(info["success"]), terminated or truncated
        if on_step is not None:
            on_step(len(actions))
    return Trajectory(
        start=start,
        instruction=env.instruction(start.task),
        images=np.stack(images),
        actions=np.stack(actions).astype(np.float32),
        ee_state=np.stack(ee_states).astype(np.float32),
        success=success,
        source="expert",
    )


def _exit_with_parent() -> None:
    """End this process as soon as the parent has gone, even in the middle of a simulator step."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def worker_main(pipe: Connection, env_config: Section, config: DemosSection, seed: int) -> None:
    """Make attempts until told to stop (None) or the parent goes away.

    Sends `WorkerReady`, then for each `Attempt` the number of each step done (its heartbeat) and at the end a table
    (success) or None (no success). `WorkerFailure` replaces any of these.
    """
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    env: Env | None = None
    try:
        env = resolve("envs", env_config.kind)(env_config)  # pyright: ignore[reportAttributeAccessIssue]
        assert env is not None
        num_starts = env.num_starts("train")
        pipe.send(WorkerReady(tasks=tuple(env.tasks), num_starts=num_starts))
        while (attempt := pipe.recv()) is not None:
            start = Start(attempt.task, "train", attempt.number % num_starts)
            trajectory = run_attempt(env, start, config, noise_generator(seed, attempt), pipe.send)
            table: pa.Table | None = trajectory_table(trajectory) if trajectory.success else None
            pipe.send(("done", table))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has gone or is going; nothing is left to tell it
    except Exception as error:  # noqa: BLE001 (whatever the simulator raises is told to the parent)
        shown = error if isinstance(error, ReachRLError) else None
        pipe.send(WorkerFailure(text=traceback.format_exc(), error=shown))
    finally:
        if env is not None:
            env.close()
