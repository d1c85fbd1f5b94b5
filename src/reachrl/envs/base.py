"""What a simulator offers: language tasks, numbered start states, honest episode ends."""

import zlib
from abc import abstractmethod
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from reachrl.config.base import Section
from reachrl.envs.render_device import render_variables
from reachrl.types import SPLITS, Split, Start

SPLIT_NUMBER: dict[Split, int] = {"train": 0, "eval": 1, "validation": 2}  # part of figures: never change one


class Env(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """One simulator instance with several language-described tasks.

    Observations are a dict: `image` u8[H W 3] and `ee_state` f32[4] (end-effector x y z in metres,
    gripper opening 0 closed .. 1 open). Actions are f32[D] in the simulator's own units, clipped by the
    env to `action_space`.

    `step` returns `reward = 1.0` on the step that succeeds and 0 otherwise, `terminated` on success,
    `truncated` at the time limit (never both), and `info["success"]`. A simulator that knows how far along the
    task is also reports it after `reset` and `step`, as `info["progress"]` in [0, 1].
    The same (task, split, index) always gives the same episode for the same actions, whatever was run
    before in this instance: exact resume replays actions and relies on it.
    """

    Config: ClassVar[type[Section]]
    config: Any
    tasks: tuple[str, ...]
    observation_space: gym.spaces.Dict  # pyright: ignore[reportIncompatibleVariableOverride]
    action_space: gym.spaces.Box  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def prepare(cls, config: Any) -> None:
        """Do once, before worker processes start, what they all need: look for assets, download them.

        Args:
            config: the environment's section.

        Raises:
            ReachRLError: the environment cannot be made; told here, it costs no worker.
        """

    @classmethod
    def worker_variables(cls, config: Any, row: int) -> dict[str, str]:
        """Environment variables that the process of environment `row` starts with: which GPU draws its frames.

        Args:
            config: the environment's section.
            row: number of the process, from 0.
        """
        return render_variables(config.render_device, row)

    @classmethod
    def caveats(cls, config: Any) -> tuple[str, ...]:
        """What has to stand beside every success rate measured with `config`; nothing, usually.

        Args:
            config: the environment's section.
        """
        return ()

    @abstractmethod
    def instruction(self, task: str) -> str:
        """The sentence that describes `task`."""

    def num_starts(self, split: Split) -> int:
        """How many numbered start states each task has in `split`: as many as the configuration says.

        There are as many for validation as for evaluation, and none of the one is one of the other.
        """
        return self.config.num_train_starts if split == "train" else self.config.num_eval_starts

    @abstractmethod
    def expert_action(self) -> np.ndarray:
        """The scripted expert's action f32[D] for the current state.

        Raises:
            NotImplementedError: this simulator has no expert.
        """

    @abstractmethod
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the episode `options["start"]`, a `Start`."""


def start_option(options: dict[str, Any] | None) -> Start:
    """The `Start` carried by reset's options; the first check every environment makes."""
    start = (options or {}).get("start")
    if not isinstance(start, Start):
        raise ValueError("reset needs options={'start': Start(task, split, index)}")
    return start


def start_key(start: Start) -> list[int]:
    """Entropy for `np.random.default_rng`: one sequence for each task, split and number, for whoever draws starts."""
    return [zlib.crc32(start.task.encode()), SPLIT_NUMBER[start.split], start.index]


def check_start(env: Env, start: Start) -> None:
    """Refuse a start that `env` does not have.

    Raises:
        ValueError: unknown task or split, or number out of range.
    """
    if start.task not in env.tasks:
        raise ValueError(f"no task {start.task!r} here; tasks: {', '.join(env.tasks)}")
    if start.split not in SPLITS:
        raise ValueError(f"no split {start.split!r} of starts; there are {', '.join(SPLITS)}")
    if not 0 <= start.index < env.num_starts(start.split):
        raise ValueError(f"{start} is out of range: there are {env.num_starts(start.split)} {start.split} starts")
