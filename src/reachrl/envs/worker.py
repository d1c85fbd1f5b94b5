"""One environment in one process: `python -m reachrl.envs.worker`, started by `VectorEnv`.

Frames and end-effector states go through a memory map shared with the parent; everything else is one JSON
message each way per command.
"""

import json
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from reachrl.child import limit_reached, pipe_to_parent
from reachrl.envs.base import Env
from reachrl.envs.shared_arrays import SharedArrays
from reachrl.errors import ConfigError, ReachRLError
from reachrl.registry import build, receive, section_class
from reachrl.types import SPLITS, Start

# Whoever decodes the next actions gets a core at once: many simulators wait for it, it waits for the slowest only.
_NICENESS = 10


class Worker:
    """Answers the parent's commands with one environment.

    Args:
        env: the environment.
        arrays: the shared memory.
        row: this worker's row in it.
    """

    def __init__(self, env: Env, arrays: SharedArrays, row: int):
        self.env, self.arrays, self.row = env, arrays, row
        self.progress = np.nan  # as the simulator reported it last

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command; the method of its name gets its arguments."""
        arguments = dict(command)
        name = arguments.pop("do")
        return {"describe": self.describe, "reset": self.reset, "step": self.step}[name](**arguments)

    def describe(self) -> dict[str, Any]:
        """What the parent needs to know about the environment."""
        env, shape = self.env, self.arrays.images.shape[1:]
        seen = env.observation_space["image"].shape
        if seen != shape:
            raise ValueError(f"frames are {seen}, but env.image_size promises {shape}")
        return {
            "tasks": env.tasks,
            "instructions": {task: env.instruction(task) for task in env.tasks},
            "num_starts": {split: env.num_starts(split) for split in SPLITS},
            "action_dim": env.action_space.shape[0],
        }

    def reset(self, start: list[Any], actions: list[list[float]]) -> dict[str, Any]:
        """Begin an episode and take the first `actions` of it."""
        observation, info = self.env.reset(options={"start": Start(*start)})
        for action in actions:
            observation, _, terminated, truncated, info = self.env.step(np.asarray(action, np.float32))
            if terminated or truncated:
                raise ValueError(f"replayed actions end the episode {start}: they were not recorded in it")
        self.arrays.images[self.row] = observation["image"]
        self.arrays.ee_state[self.row] = observation["ee_state"]
        self.progress = info.get("progress", np.nan)
        return {}

    def step(self, action: list[float], next_start: list[Any]) -> dict[str, Any]:
        """Take one decision; an episode that ends gives way to `next_start` at once."""
        observation, _, terminated, truncated, info = self.env.step(np.asarray(action, np.float32))
        success = bool(info["success"])
        self.arrays.ee_state[self.row] = observation["ee_state"]
        self.arrays.progress[self.row] = self.progress, info.get("progress", np.nan)
        if terminated or truncated:
            self.arrays.final_images[self.row] = observation["image"]
            observation, info = self.env.reset(options={"start": Start(*next_start)})
        self.arrays.images[self.row] = observation["image"]
        self.progress = info.get("progress", np.nan)
        return {"flags": [success, bool(terminated), bool(truncated)]}


def serve(connection: Connection) -> None:
    """Answer commands until the parent closes the connection or goes away."""
    setup = json.loads(connection.recv_bytes())
    worker: Worker | None = None
    while True:
        try:
            command = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if worker is None:
                receive(setup["kind"], setup["code"])
                section = section_class("envs", setup["kind"])
                env = build("envs", section.model_validate(setup["config"]))
                arrays = SharedArrays(setup["memory"], setup["num_envs"], setup["image_size"])
                worker = Worker(env, arrays, setup["row"])
            reply = worker.answer(command)
        except ReachRLError as error:
            reply = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            limit = None if isinstance(error, BlockingIOError) else limit_reached(error)
            reply = {"error": limit or traceback.format_exc(), "kind": ConfigError.__name__ if limit else None}
        try:
            connection.send_bytes(json.dumps(reply).encode())
        except BrokenPipeError:
            return


def main() -> None:
    """Entry point of the worker process."""
    os.nice(_NICENESS)
    serve(pipe_to_parent())
    os._exit(0)  # GL libraries complain when Python tears them down


if __name__ == "__main__":
    main()
