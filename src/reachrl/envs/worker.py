"""One or several environments in one process: `python -m reachrl.envs.worker`, started by `VectorEnv`.

Frames and states go through a memory map shared with the parent, everything else through `reachrl.worker`'s messages.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from reachrl.envs.base import Env, Perturbed, Shown
from reachrl.envs.shared_arrays import SharedArrays
from reachrl.registry import build, receive, section_class
from reachrl.types import SPLITS, Start
from reachrl.worker import Notify, run_worker


class Worker:
    """Answers the parent's commands with its environments.

    Args:
        envs: by their rows in the shared memory.
        memory: file descriptor of the shared memory, which has its size once an episode is to begin.
        num_envs: rows in it.
    """

    def __init__(self, envs: Mapping[int, Env], memory: int, num_envs: int):
        self.envs, self._memory, self._num_envs = dict(envs), memory, num_envs
        self.shown = Shown.of(next(iter(envs.values())).observation_space)
        self.progress = dict.fromkeys(envs, np.nan)  # as the simulators reported it last

    @functools.cached_property
    def arrays(self) -> SharedArrays:
        """The shared memory."""
        return SharedArrays(self._memory, self._num_envs, self.shown)

    def describe(self) -> dict[str, Any]:
        """Facts about the environment that the parent needs."""
        env = next(iter(self.envs.values()))
        return {
            "shown": self.shown.json(),
            "control_hz": env.control_hz,
            "tasks": env.tasks,
            "instructions": {task: env.instruction(task) for task in env.tasks},
            "num_starts": {split: env.num_starts(split) for split in SPLITS},
            "action_dim": env.action_space.shape[0],
            "action_bounds": [env.action_space.low.tolist(), env.action_space.high.tolist()],
        }

    def reset(self, episodes: list[tuple[list[Any], list[list[float]]]]) -> dict[str, Any]:
        """Begin an episode in each environment and take the first actions of it."""
        for (row, env), (start, actions) in zip(self.envs.items(), episodes, strict=True):
            self.arrays.stepping[row] = 1
            observation, info = env.reset(options={"start": Start(*start)})
            for action in actions:
                observation, _, terminated, truncated, info = env.step(np.asarray(action, np.float32))
                if terminated or truncated:
                    raise ValueError(f"replayed actions end the episode {start}: they were not recorded in it")
            self.arrays.show(row, observation)
            self.arrays.ee_state[row] = observation["ee_state"]
            self.progress[row] = info.get("progress", np.nan)
            self.arrays.stepping[row] = 0
        return {}

    def step(self, actions: list[list[list[float]]], next_starts: list[list[Any]]) -> dict[str, Any]:
        """Carry out each environment's chunk, up to its episode's end."""
        flags, executed = [], []
        for row, chunk, next_start in zip(self.envs, actions, next_starts, strict=True):
            self.arrays.stepping[row] = 1
            ended, count = self._step(row, chunk, next_start)
            self.arrays.stepping[row] = 0
            flags.append(ended)
            executed.append(count)
        return {"flags": flags, "executed": executed}

    def _step(self, row: int, actions: list[list[float]], next_start: list[Any]) -> tuple[list[bool], int]:
        """An episode that ends gives way to `next_start` at once."""
        env, executed = self.envs[row], 0
        for action in actions:
            executed += 1
            observation, _, terminated, truncated, info = env.step(np.asarray(action, np.float32))
            if terminated or truncated:
                break
        success = bool(info["success"])
        self.arrays.ee_state[row] = observation["ee_state"]
        self.arrays.progress[row] = self.progress[row], info.get("progress", np.nan)
        if terminated or truncated:
            self.arrays.show_final(row, observation)
            observation, info = env.reset(options={"start": Start(*next_start)})
        self.arrays.show(row, observation)
        self.progress[row] = info.get("progress", np.nan)
        return [success, bool(terminated), bool(truncated)], executed


def make(setup: dict[str, Any], _: Notify) -> Worker:
    """The environments of the parent's first message: kind, code (`registry.send`), config, rows, memory, niceness."""
    os.nice(setup["niceness"])
    receive(setup["kind"], setup["code"])
    section = section_class("envs", setup["kind"]).model_validate(setup["config"])
    envs = {row: Perturbed(build("envs", section)) for row in setup["rows"]}
    return Worker(envs, setup["memory"], setup["num_envs"])


if __name__ == "__main__":
    run_worker(make)
