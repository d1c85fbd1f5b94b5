"""One environment in one process: `python -m reachrl.envs.worker`, started by `VectorEnv`.

Frames and states go through a memory map shared with the parent, everything else through `reachrl.worker`'s messages.
"""

import functools
from typing import Any

import numpy as np

from reachrl.envs.base import Env, Shown
from reachrl.envs.shared_arrays import SharedArrays
from reachrl.registry import build, receive, section_class
from reachrl.types import SPLITS, Start
from reachrl.worker import Notify, run_worker

# The process that decodes actions has priority: all simulators wait for it, it waits for the slowest only.
_NICENESS = 10


class Worker:
    """Answers the parent's commands with one environment.

    Args:
        env: the environment.
        memory: file descriptor of the shared memory, which has its size once an episode is to begin.
        num_envs: rows in it.
        row: this worker's.
    """

    def __init__(self, env: Env, memory: int, num_envs: int, row: int):
        self.env, self._memory, self._num_envs, self.row = env, memory, num_envs, row
        self.shown = Shown.of(env.observation_space)
        self.progress = np.nan  # as the simulator reported it last

    @functools.cached_property
    def arrays(self) -> SharedArrays:
        """The shared memory."""
        return SharedArrays(self._memory, self._num_envs, self.shown)

    def describe(self) -> dict[str, Any]:
        """Facts about the environment that the parent needs."""
        env = self.env
        return {
            "shown": self.shown.json(),
            "control_hz": env.control_hz,
            "tasks": env.tasks,
            "instructions": {task: env.instruction(task) for task in env.tasks},
            "num_starts": {split: env.num_starts(split) for split in SPLITS},
            "action_dim": env.action_space.shape[0],
            "action_bounds": [env.action_space.low.tolist(), env.action_space.high.tolist()],
        }

    def reset(self, start: list[Any], actions: list[list[float]]) -> dict[str, Any]:
        """Begin an episode and take the first `actions` of it."""
        observation, info = self.env.reset(options={"start": Start(*start)})
        for action in actions:
            observation, _, terminated, truncated, info = self.env.step(np.asarray(action, np.float32))
            if terminated or truncated:
                raise ValueError(f"replayed actions end the episode {start}: they were not recorded in it")
        self.arrays.show(self.row, observation)
        self.arrays.ee_state[self.row] = observation["ee_state"]
        self.progress = info.get("progress", np.nan)
        return {}

    def step(self, actions: list[list[float]], next_start: list[Any]) -> dict[str, Any]:
        """Carry out a chunk, up to its episode's end; an episode that ends gives way to `next_start` at once."""
        executed = 0
        for action in actions:
            executed += 1
            observation, _, terminated, truncated, info = self.env.step(np.asarray(action, np.float32))
            if terminated or truncated:
                break
        success = bool(info["success"])
        self.arrays.ee_state[self.row] = observation["ee_state"]
        self.arrays.progress[self.row] = self.progress, info.get("progress", np.nan)
        if terminated or truncated:
            self.arrays.show_final(self.row, observation)
            observation, info = self.env.reset(options={"start": Start(*next_start)})
        self.arrays.show(self.row, observation)
        self.progress = info.get("progress", np.nan)
        return {"flags": [success, bool(terminated), bool(truncated)], "executed": executed}


def make(setup: dict[str, Any], _: Notify) -> Worker:
    """The environment that the parent's first message describes: kind, code (`registry.send`), config, row, memory."""
    receive(setup["kind"], setup["code"])
    section = section_class("envs", setup["kind"])
    env = build("envs", section.model_validate(setup["config"]))
    return Worker(env, setup["memory"], setup["num_envs"], setup["row"])


if __name__ == "__main__":
    run_worker(make, _NICENESS)
