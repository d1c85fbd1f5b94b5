"""The interface of a simulator: language tasks, numbered start states, termination apart from truncation."""

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np

from reachrl.config.base import Section
from reachrl.config.perturbations import GENERAL_AXES, PublishedTask, Variant
from reachrl.envs.render_device import render_variables
from reachrl.errors import ExtensionError
from reachrl.functional.perturbation import Filter
from reachrl.types import SPLITS, Observation, Split, Start

SPLIT_NUMBER: dict[Split, int] = {"train": 0, "eval": 1, "validation": 2}  # part of figures: never change one


class Simulator:
    """What is said of a kind of environments before any is made."""

    Config: ClassVar[type[Section]]
    shares_process: ClassVar[bool] = False
    """Whether several environments of this class can live in one process. Say so where they share what costs time or
    memory there (what frames are drawn with, assets); a process that dies takes the episodes of all of them along."""

    @classmethod
    def prepare(cls, config: Any) -> None:
        """Do once, before environments are made, what they all need: look for assets, download them.

        Args:
            config: the environment's section.

        Raises:
            ReachRLError: the environment cannot be made; told here, it costs no worker.
        """

    @classmethod
    def caveats(cls, config: Any) -> tuple[str, ...]:
        """What has to stand beside every success rate measured with `config`; nothing, usually.

        Args:
            config: the environment's section.
        """
        return ()


class Env(gym.Env[dict[str, Any], np.ndarray], Simulator):
    """One simulator instance with several language-described tasks.

    Observations are a dict: `images`, a dict with the frame u8[H W 3] of each camera, `ee_state` f32[4] (end-effector
    x y z in metres, gripper opening 0 closed .. 1 open) and, where policies are to see it, `state` f32[S]
    (proprioception, in any units). `observation_space` names the same, and its first camera is what policies and reward
    models with a single eye look at. Actions are f32[D] in the simulator's own units, clipped by the
    env to `action_space`.

    `step` returns `reward = 1.0` on the step that succeeds and 0 otherwise, `terminated` on success,
    `truncated` at the time limit (never both), and `info["success"]`. A simulator that knows how far along the
    task is also reports it after `reset` and `step`, as `info["progress"]` in [0, 1].
    The same (task, split, index) always gives the same episode for the same actions, whatever was run
    before in this instance: exact resume replays actions and relies on it.
    """

    config: Any
    tasks: tuple[str, ...]
    observation_space: gym.spaces.Dict  # pyright: ignore[reportIncompatibleVariableOverride]
    action_space: gym.spaces.Box  # pyright: ignore[reportIncompatibleVariableOverride]
    control_hz: float | None = None
    """Actions a second of simulated time, kept with recorded episodes; None: it is not known."""

    @classmethod
    def worker_variables(cls, config: Any, row: int) -> dict[str, str]:
        """Environment variables that the process of environment `row` starts with: which GPU draws its frames.

        Args:
            config: the environment's section.
            row: number of the process, from 0.
        """
        return render_variables(config.render_device, row)

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

    def rest_action(self) -> np.ndarray:
        """The action f32[D] that leaves the robot as it is: zeros, unless a simulator knows better."""
        return np.clip(np.zeros(self.action_space.shape, np.float32), self.action_space.low, self.action_space.high)

    @abstractmethod
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode `options["start"]`, a `Start`.

        Its `variant` names one of `config.axes`, of which those that every environment has are applied around this one,
        or a task of one of `config.suites`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Shapes of an environment's observations (camera frames and state), from its `observation_space`."""

    cameras: dict[str, tuple[int, ...]]
    state_size: int | None

    @classmethod
    def of(cls, space: gym.spaces.Dict) -> Self:
        """Read an environment's `observation_space`.

        Raises:
            ExtensionError: it does not keep the contract of `reachrl.envs.base.Env`.
        """
        if "image" in space.spaces:
            raise ExtensionError(
                "environment contract: observation_space has the key `image`, but frames go by their camera: make it "
                "gym.spaces.Dict({'images': gym.spaces.Dict({'front': Box(0, 255, (H, W, 3), np.uint8)}), "
                "'ee_state': ...}), and return {'images': {'front': frame}, 'ee_state': ...}"
            )
        images = space.spaces.get("images")
        if not isinstance(images, gym.spaces.Dict) or not images.spaces:
            raise ExtensionError(
                "environment contract: observation_space['images'] is a gym.spaces.Dict with a Box u8[H W 3] for each "
                f"camera; it is {images}"
            )
        # A Dict of gymnasium sorts the keys of a plain dict: the first camera is the first the environment names.
        cameras: dict[str, Any] = {name: box.shape for name, box in images.spaces.items()}
        for name, shape in cameras.items():
            if images.spaces[name].dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
                raise ExtensionError(
                    f"environment contract: observation_space['images'][{name!r}] is a Box u8[H W 3]; it is "
                    f"{images.spaces[name]}"
                )
        state = space.spaces.get("state")
        if state is not None and (state.dtype != np.float32 or state.shape is None or len(state.shape) != 1):
            raise ExtensionError(f"environment contract: observation_space['state'] is a Box f32[S]; it is {state}")
        return cls(cameras=cameras, state_size=None if state is None or state.shape is None else state.shape[0])

    def json(self) -> dict[str, Any]:
        """As JSON types, cameras in order."""
        return {"cameras": {name: list(shape) for name, shape in self.cameras.items()}, "state_size": self.state_size}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """What `json` described."""
        cameras = {name: tuple(shape) for name, shape in found["cameras"].items()}
        return cls(cameras=cameras, state_size=found["state_size"])

    def noise(self, rng: np.random.Generator, instructions: tuple[str, ...]) -> Observation:
        """Random rows of this shape, one for each of `instructions`."""
        rows = len(instructions)
        return Observation(
            images={name: rng.integers(0, 256, (rows, *shape), np.uint8) for name, shape in self.cameras.items()},
            instructions=instructions,
            state=None if self.state_size is None else rng.standard_normal((rows, self.state_size)).astype(np.float32),
        )


def observed(cameras: Sequence[str], image_size: int, *, state_size: int | None = None) -> gym.spaces.Dict:
    """The `observation_space` of an environment whose frames are square.

    Args:
        cameras: their names, in order.
        image_size: H = W.
        state_size: S; None: there is no `state`.
    """
    frame = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    spaces: dict[str, gym.Space[Any]] = {
        # From pairs: gymnasium would sort the keys of a dict.
        "images": gym.spaces.Dict([(camera, frame) for camera in cameras]),
        "ee_state": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    }
    if state_size is not None:
        spaces["state"] = gym.spaces.Box(-np.inf, np.inf, (state_size,), np.float32)
    return gym.spaces.Dict(spaces)


def start_option(options: dict[str, Any] | None) -> Start:
    """The `Start` carried by reset's options; the first check every environment makes."""
    start = (options or {}).get("start")
    if not isinstance(start, Start):
        raise ValueError("reset needs options={'start': Start(task, split, index)}")
    return start


def start_key(start: Start) -> list[int]:
    """Entropy for `np.random.default_rng`: one sequence for each task, split and number, for drawing starts."""
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


class Perturbed(Env):
    """An environment with noise and delay around it, where a start's variant asks for them.

    Args:
        env: the environment; other variants are its own affair.
    """

    def __init__(self, env: Env) -> None:
        self.env, self.config, self.tasks, self.control_hz = env, env.config, env.tasks, env.control_hz
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._filter: Filter | None = None
        self._steps = 0

    def instruction(self, task: str) -> str:
        """That of the environment."""
        return self.env.instruction(task)

    def num_starts(self, split: Split) -> int:
        """Those of the environment."""
        return self.env.num_starts(split)

    def expert_action(self) -> np.ndarray:
        """That of the environment."""
        return self.env.expert_action()

    def rest_action(self) -> np.ndarray:
        """That of the environment."""
        return self.env.rest_action()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode `options["start"]`.

        Raises:
            ValueError: its variant is of an axis or a suite that the environment does not have.
        """
        start = (options or {}).get("start")
        self._filter, self._steps = None, 0
        if isinstance(start, Start) and start.variant:
            self._filter = self._checked(start_option(options))
        observation, info = self.env.reset(seed=seed, options=options)
        return self._seen(observation), info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carry out what arrives now."""
        self._steps += 1
        if self._filter is None:
            return self.env.step(action)  # pyright: ignore[reportReturnType]
        observation, *rest = self.env.step(self._filter.arriving(action))
        return (self._seen(observation), *rest)  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()

    def _checked(self, start: Start) -> Filter | None:
        published = PublishedTask.of(start)
        if published is not None and published.suite not in self.config.suites:
            there = ", ".join(self.config.suites) or "none"
            raise ValueError(
                f"{start.variant}: {self.config.kind} has no such suite of perturbed tasks; it has {there}"
            )
        variant, axes = Variant.of(start), {**GENERAL_AXES, **self.config.axes}
        if variant is not None and variant.axis not in axes:
            raise ValueError(f"{start.variant}: {self.config.kind} has no such axis; it has {', '.join(axes)}")
        return Filter.of(start, self.env.rest_action())

    def _seen(self, observation: dict[str, Any]) -> dict[str, Any]:
        if self._filter is None:
            return observation
        return observation | {"images": self._filter.seen(observation["images"], self._steps)}
