"""One attempt of a scripted expert, and the worker process (`reachrl.demos.expert`) that makes attempts on request."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from reachrl.config.demos import DemosSection
from reachrl.demos.episode_table import trajectory_table
from reachrl.envs.base import Env, Perturbed, Shown
from reachrl.errors import ConfigError, ExtensionError
from reachrl.registry import build, receive, section_class
from reachrl.streams import Stream, generator
from reachrl.types import Start, Trajectory
from reachrl.worker import Notify, run_worker


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """The `number`-th attempt at a task; numbers beyond the start states go round them again with other noise."""

    task: str
    number: int


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
    perturbed = Perturbed(env)
    observation, _ = perturbed.reset(options={"start": start})
    _check_finite(observation["ee_state"], "ee_state", env, start, 0)
    seen, actions = [copy.deepcopy(observation)], []
    success = done = False
    while not done:
        clean = np.clip(np.asarray(_expert_action(env, start), np.float32), low, high)
        _check_finite(clean, "the expert's action", env, start, len(actions))
        noise, use = rng.standard_normal(clean.shape), rng.random() < config.noise_probability
        executed = clean + use * config.action_noise * 0.5 * (high - low) * noise
        executed = np.clip(executed, low, high).astype(np.float32)
        observation, _, terminated, truncated, info = perturbed.step(executed)
        seen.append(copy.deepcopy(observation))
        _check_finite(observation["ee_state"], "ee_state", env, start, len(actions))
        actions.append(clean)
        success, done = bool(info["success"]), terminated or truncated
        if on_step is not None:
            on_step(len(actions))
    return Trajectory(
        start=start.plain,
        instruction=env.config.spoken(env.instruction(start.task), start),
        images={camera: np.stack([each["images"][camera] for each in seen]) for camera in shown.cameras},
        actions=np.stack(actions).astype(np.float32),
        ee_state=np.stack([each["ee_state"] for each in seen]).astype(np.float32),
        success=success,
        source="expert",
        state=None if shown.state_size is None else np.stack([each["state"] for each in seen]).astype(np.float32),
        control_hz=env.control_hz,
    )


def _check_finite(values: np.ndarray, what: str, env: Env, start: Start, step: int) -> None:
    """Raise if a number is not finite."""
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


class Demonstrator:
    """Answers the parent's commands with one environment and its scripted expert.

    Args:
        env: the simulator.
        config: noise and its probability.
        seed: the run's.
        notify: tells the parent of every step done.
    """

    def __init__(self, env: Env, config: DemosSection, seed: int, notify: Notify) -> None:
        self.env, self.config, self.seed, self.notify = env, config, seed, notify

    def describe(self) -> dict[str, Any]:
        """Facts about the environment that the parent needs."""
        shown = Shown.of(self.env.observation_space)
        return {
            "tasks": self.env.tasks,
            "num_starts": self.env.num_starts("train"),
            "action_dim": self.env.action_space.shape[0],
            "cameras": list(shown.cameras),
            "state_size": shown.state_size,
        }

    def attempt(self, task: str, number: int) -> dict[str, Any]:
        """Make one attempt; its `data` is the episode as a table in Arrow's stream format, None without success."""
        start = Start(task, "train", number % self.env.num_starts("train"))
        randomise, axes = self.config.randomise, self.env.config.axes
        start = randomise.varied(start, axes, self.seed, Stream.RANDOMISE_DEMOS, task, number)
        rng = noise_generator(self.seed, Attempt(task, number))
        trajectory = run_attempt(self.env, start, self.config, rng, lambda step: self.notify({"step": step}))
        return {"data": table_bytes(trajectory_table(trajectory)) if trajectory.success else None}


def table_bytes(table: pa.Table) -> bytes:
    """A table in Arrow's stream format; `pa.ipc.open_stream` reads it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def make(setup: dict[str, Any], notify: Notify) -> Demonstrator:
    """The environment that the parent's first message describes: kind, code (`registry.send`), env, demos, seed."""
    receive(setup["kind"], setup["code"])
    env = build("envs", section_class("envs", setup["kind"]).model_validate(setup["env"]))
    return Demonstrator(env, DemosSection.model_validate(setup["demos"]), setup["seed"], notify)


if __name__ == "__main__":
    run_worker(make)
