"""The data that travels between environments, policies, rewards and the learner; rows can be taken out and joined.

Dimension names used everywhere: `T` decisions per env, `N` envs, `A` token slots of an answer, `H` actions of a chunk,
`K` of them carried out, `D` action dimensions, `S` numbers of a state, `B` minibatch rows, `L` prompt tokens, `H W`
frame size, `P` image patches.
Images are by camera, in the environment's order; each camera may have a frame size of its own.

Everything here is numpy, so that an environment worker never imports torch. The torch-side records
(`PolicyInputs`, `ActionSample`, `Batch`) live beside the interface that produces them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

Split = Literal["train", "validation", "eval"]
SPLITS: tuple[Split, ...] = ("train", "validation", "eval")


@dataclass(frozen=True, slots=True, order=True)
class Start:
    """One numbered start state of one task.

    `train` starts are learned from, `validation` starts are evaluated during training, to choose a checkpoint or a
    learning rate by, and `eval` starts are the test: nothing is learned from them or chosen by them.
    """

    task: str
    split: Split
    index: int
    variant: str = field(default="", repr=False)  # fingerprints of stored data hold what is printed
    """What is changed about the episode, such as `camera=10`, see `reachrl.config.perturbations`; empty: nothing."""

    @property
    def plain(self) -> "Start":
        """The same start with nothing changed: what data are split by."""
        return Start(self.task, self.split, self.index)


@dataclass(frozen=True, slots=True)
class Draw:
    """A start state drawn by a curriculum, with the probability it had in that draw; None: unknown."""

    start: Start
    chance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What `N` rows show the policy: all environments at one moment, or decisions taken at any time."""

    images: dict[str, UInt8[np.ndarray, "N H W 3"]]
    instructions: tuple[str, ...]
    state: Float32[np.ndarray, "N S"] | None = None  # proprioception, as the environment offers it

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def frames(self) -> UInt8[np.ndarray, "N H W 3"]:
        """The images of the first camera."""
        return first_camera(self.images)

    def rows(self, index: "slice | Int64[np.ndarray, 'b']") -> "Observation":
        """The rows `index`, in that order."""
        numbers: list[int] = np.arange(len(self))[index].tolist()
        return Observation(
            images={camera: frames[index] for camera, frames in self.images.items()},
            instructions=tuple(self.instructions[row] for row in numbers),
            state=None if self.state is None else self.state[index],
        )

    @staticmethod
    def concat(parts: "Sequence[Observation]") -> "Observation":
        """The rows of all `parts` (at least one, all with the same cameras), one part after the other."""
        states = [part.state for part in parts if part.state is not None]
        return Observation(
            images={camera: np.concatenate([part.images[camera] for part in parts]) for camera in parts[0].images},
            instructions=tuple(text for part in parts for text in part.instructions),
            state=np.concatenate(states) if states else None,
        )


def first_camera(images: dict[str, UInt8[np.ndarray, "..."]]) -> UInt8[np.ndarray, "..."]:
    """The images that policies, reward models and films with a single eye look at."""
    return next(iter(images.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvStep:
    """The outcome of one decision in each of `N` environments: of a chunk of actions carried out one after the other.

    A chunk ends early where its episode does. `ee_state`, `progress` and the observation are those after the last
    action carried out; what is to be seen between two actions of a chunk nobody sees. A row that ended has already been
    reset: `observation` shows the next episode's first frame and `final_observation` what the one that ended showed
    last (rows that did not end are undefined).
    """

    observation: Observation
    success: Bool[np.ndarray, "N"]
    terminated: Bool[np.ndarray, "N"]
    truncated: Bool[np.ndarray, "N"]
    valid: Bool[np.ndarray, "N"]  # False: the worker was lost in this step; the row is no data
    executed: Int32[np.ndarray, "N"]  # control steps carried out; 0 where the row is no data
    final_observation: Observation
    ee_state: Float32[np.ndarray, "N 4"]  # after the last action, before any reset: x y z in m, gripper 0..1
    progress: Float32[np.ndarray, "N 2"]  # before and after the actions, as the simulator knows it; NaN: it does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One finished episode, as the curriculum, the metrics and the report see it."""

    start: Start
    success: bool
    num_steps: int  # control steps: actions carried out
    num_decisions: int  # how often the policy was asked: rows of the rollouts
    env: int
    group: int | None = None  # number of the group of whole episodes that began in the same start; None: no groups
    chance: float | None = None  # probability with which the curriculum drew `start`; None: unknown


OUTCOMES = ("success", "terminated", "truncated", "valid", "executed", "ee_state", "progress")
"""Fields of a rollout that are those of its `EnvStep`s."""
PER_STEP = ("token_ids", "token_mask", "behaviour_logprobs", "malformed", *OUTCOMES)
"""Fields of a rollout with an entry for each step and environment; so have each camera's images, and the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """`T` decisions in each of `N` environments, collected with one policy version."""

    images: dict[str, UInt8[np.ndarray, "T N H W 3"]]  # by camera, RGB: what the policy saw before each decision
    instructions: tuple[tuple[str, ...], ...]  # T tuples of N
    state: Float32[np.ndarray, "T N S"] | None = None  # before each decision; None: the simulator has none
    last_observation: Observation  # after step T, the bootstrap of rows still running
    final_observation: Observation  # E rows: what each of the E ended episodes showed last
    final_rows: Int64[np.ndarray, "E 2"]  # (t, n) of the step that ended each of them
    token_ids: Int64[np.ndarray, "T N A"]  # the answer: tokens of the policy, not numbers of an action
    token_mask: Bool[np.ndarray, "T N A"]  # the slots that the policy filled; the others hold id 0 and log-prob 0
    behaviour_logprobs: Float32[np.ndarray, "T N A"]  # of each token as it was sampled, in nats
    malformed: Bool[np.ndarray, "T N"]  # the answer stood for no action: the policy's safe action was carried out
    success: Bool[np.ndarray, "T N"]  # the task was solved by this decision
    terminated: Bool[np.ndarray, "T N"]  # the episode ended here by itself
    truncated: Bool[np.ndarray, "T N"]  # the time limit ended it here
    valid: Bool[np.ndarray, "T N"]  # False: the worker was lost, the row is no data and its reward must be 0
    executed: Int32[np.ndarray, "T N"]  # control steps of each decision: its chunk, up to the episode's end
    ee_state: Float32[np.ndarray, "T N 4"]  # after each decision: x y z in m, gripper 0 closed to 1 open
    progress: Float32[np.ndarray, "T N 2"]  # before and after each decision, 0..1; NaN where the simulator has none
    episodes: tuple[Episode, ...]  # the E that ended, in the order of `final_rows`
    policy_version: int  # number of the weights that acted
    control_hz: float | None = None  # control steps a second of simulated time; None: unknown
    action_bounds: Float32[np.ndarray, "2 D"] | None = None  # lowest and highest that is carried out; None: unknown
    inputs: tuple[Any, ...] | None = None  # of each step, as `policy.cache` makes them; None: they were not kept

    @property
    def frames(self) -> UInt8[np.ndarray, "T N H W 3"]:
        """The images of the first camera."""
        return first_camera(self.images)

    @property
    def final_frames(self) -> UInt8[np.ndarray, "E H W 3"]:
        """The last image of the first camera, of each ended episode."""
        return self.final_observation.frames

    def decisions(self) -> Observation:
        """What was seen before each decision: `T * N` rows, those of one step side by side."""
        return Observation(
            images={camera: frames.reshape(-1, *frames.shape[2:]) for camera, frames in self.images.items()},
            instructions=tuple(text for row in self.instructions for text in row),
            state=None if self.state is None else self.state.reshape(-1, self.state.shape[-1]),
        )

    def each_array(self, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        """What `change` makes of each array [T N ...], by field, to `replace` them: images and state too."""
        return {name: change(getattr(self, name)) for name in PER_STEP} | {
            "images": {camera: change(frames) for camera, frames in self.images.items()},
            "state": None if self.state is None else change(self.state),
        }

    @property
    def num_env_steps(self) -> int:
        """Control steps that count as data."""
        return int(self.executed[self.valid].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """The reward of every decision; `parts` sum to `total` and stay apart up to the plot.

    It is seen from the decision's beginning: what the k-th action of a chunk earns counts `gamma ** (k - 1)` times.
    """

    total: Float32[np.ndarray, "T N"]  # what training maximises, discounted
    parts: dict[str, Float32[np.ndarray, "T N"]] = field(default_factory=lambda: {})  # by name, each a curve
    progress: Float32[np.ndarray, "T N"] | None = None  # 0..1: what a dense reward thinks of the frame a step led to


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One no-gradient pass of the weights about to be trained over a rollout."""

    old_logprobs: Float32[np.ndarray, "T N A"]
    values: Float32[np.ndarray, "T+1 N"] | None  # none: the algorithm needs none
    final_values: Float32[np.ndarray, "T N"] | None  # value of the true final frame where an episode ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One stored episode: a demonstration, or a rollout kept for the reward model.

    Frame `t` is what was seen before action `t`; there is one more frame than actions, the last being
    the true final frame.
    """

    start: Start
    instruction: str
    actions: Float32[np.ndarray, "T D"]  # the clean (intended) action in the env's units
    images: dict[str, UInt8[np.ndarray, "T+1 H W 3"]]
    ee_state: Float32[np.ndarray, "T+1 4"]  # x y z in m, gripper opening 0..1
    success: bool
    source: str  # "expert", "policy", ...
    state: Float32[np.ndarray, "T+1 S"] | None = None
    control_hz: float | None = None  # actions a second of simulated or real time; None: unknown

    @property
    def frames(self) -> UInt8[np.ndarray, "F H W 3"]:
        """The images of the first camera."""
        return first_camera(self.images)
