"""`N` environments stepped together: what the collector asks of them, and the base of simulators that step many worlds.

`reachrl.envs.vector.VectorEnv` runs environments in processes of their own. A simulator that steps many worlds at once
(on a GPU, say) derives from `BatchedEnv` instead and is one object in the process that acts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from reachrl.config.env import EnvSection
from reachrl.envs.base import Shown, Simulator
from reachrl.errors import ConfigError, ExtensionError
from reachrl.functional.perturbation import Filter, arriving_at_all, seen_by_all
from reachrl.types import EnvStep, Observation, Split, Start


class EnvBatch(ABC):
    """`N` environments, each in an episode of its own; one that ends is followed at once by its next start."""

    num_envs: int
    tasks: tuple[str, ...]
    action_dim: int
    shown: Shown
    control_hz: float | None
    action_bounds: Float32[np.ndarray, "2 D"] | None = None
    """Lowest and highest of each action number that is carried out; None: they are not known."""
    execute: int | None
    """`env.execute`: actions of a chunk that are carried out; None: all."""
    lost_episodes: int = 0
    """Episodes lost with a simulator since it was made."""

    @abstractmethod
    def instruction(self, task: str) -> str:
        """The sentence that describes `task`."""

    @abstractmethod
    def num_starts(self, split: Split) -> int:
        """How many numbered start states each task has in `split`."""

    def reset(self, starts: Sequence[Start], next_starts: Sequence[Start]) -> Observation:
        """Begin `starts[n]` in environment `n`, whatever was going on before.

        Args:
            starts: N starts.
            next_starts: N starts to follow; checked here already, used by `step`.

        Returns:
            The first frames.
        """
        self._check(next_starts)
        return self.replay(starts, [np.zeros((0, self.action_dim), np.float32)] * self.num_envs)

    @abstractmethod
    def replay(self, starts: Sequence[Start], actions: Sequence[Float32[np.ndarray, "k D"]]) -> Observation:
        """Bring environment `n` to where `actions[n]` lead from `starts[n]`: an exact resume.

        Args:
            starts: N starts.
            actions: N arrays f32[k_n D] of the actions carried out since, none of which ended the episode.

        Returns:
            The frames after the last action.
        """

    def step(self, actions: Float32[np.ndarray, "N K D"], next_starts: Sequence[Start]) -> EnvStep:
        """Take one decision in every environment; `send` and `receive` in one."""
        self.send(actions, next_starts)
        return self.receive()

    @abstractmethod
    def send(self, actions: Float32[np.ndarray, "N K D"], next_starts: Sequence[Start]) -> None:
        """Begin one decision in every environment and return at once; `receive` must follow.

        Args:
            actions: K to carry out one after the other, in the environment's units; those behind an episode's end are
                not.
            next_starts: where row `n` goes if its episode ends in this step.

        Raises:
            ConfigError: actions of another shape.
            ExtensionError: an action is not finite; names the environment, the start and the step.
        """

    @abstractmethod
    def receive(self) -> EnvStep:
        """Wait for the decision that `send` began.

        Returns:
            The outcome; rows that ended, or were lost, already show their next episode.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the environments hold; safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, starts: Sequence[Start]) -> None:
        if len(starts) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} starts, got {len(starts)}")
        for start in starts:
            if start.task not in self.tasks or not 0 <= start.index < self.num_starts(start.split):
                raise ValueError(f"{start} does not exist: tasks are {', '.join(self.tasks)}; starts are numbered")

    def _spoken(self, config: EnvSection, start: Start) -> str:
        """What the policy is told in an episode."""
        return config.spoken(self.instruction(start.task), start)

    def _check_actions(self, actions: np.ndarray, kind: str) -> None:
        if actions.ndim != 3 or actions.shape[::2] != (self.num_envs, self.action_dim) or not actions.shape[1]:
            raise ConfigError(
                f"env.kind={kind} with {self.num_envs} environments takes actions f32[{self.num_envs}, K, "
                f"{self.action_dim}], got {list(actions.shape)}: the policy was made for another environment "
                "(policy.num_action_tokens)"
            )


def check_finite(what: str, values: np.ndarray, rows: Bool[np.ndarray, "N"], where: Sequence[str]) -> None:
    """Refuse numbers that would make statistics, labels and losses NaN.

    Args:
        what: the numbers are.
        values: [N ...].
        rows: those to look at.
        where: each row's name, for the message.

    Raises:
        ExtensionError: names the first row with one that is not finite.
    """
    bad = rows & ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        n = int(np.argmax(bad))
        numbers = ", ".join(f"{x:g}" for x in values[n].ravel())
        raise ExtensionError(f"{where[n]}: {what} is ({numbers}); expected finite numbers.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worlds:
    """How all `N` worlds are at one moment."""

    images: dict[str, UInt8[np.ndarray, "N H W 3"]]
    ee_state: Float32[np.ndarray, "N 4"]  # x y z in metres, gripper opening 0..1
    success: Bool[np.ndarray, "N"]
    state: Float32[np.ndarray, "N S"] | None = None
    progress: Float32[np.ndarray, "N"] | None = None  # 0..1; None: the simulator does not know it


class BatchedEnv(EnvBatch, Simulator):
    """A simulator that steps `N` worlds at once, in the process that acts.

    A kind derives from it and implements `begin`, `act` and `look`, beside `instruction`; chunks, time limits, ends of
    episodes and replays are done here. `__init__(config, num_envs)` sets `tasks`, `action_dim` and `shown`, and
    `control_hz` where it is known, after calling this one. It has no scripted expert: training begins with a policy
    that was trained elsewhere. `reachrl.testing.conformance_batch.check_batch` tries one out.

    Args:
        config: its section.
        num_envs: N.
    """

    control_hz: float | None = None

    def __init__(self, config: EnvSection, num_envs: int) -> None:
        self.config, self.num_envs, self.execute = config, num_envs, config.execute
        self._starts: list[Start | None] = [None] * num_envs
        self._steps = np.zeros(num_envs, np.int64)
        self._filters: list[Filter | None] = [None] * num_envs  # of the perturbed episodes
        self._sent: tuple[np.ndarray, list[Start]] | None = None
        self._progress = np.full(num_envs, np.nan, np.float32)  # at the beginning of the next decision

    @abstractmethod
    def begin(self, rows: Int64[np.ndarray, "R"], starts: Sequence[Start]) -> None:
        """Put the worlds `rows` into these starts; the others stay as they are.

        The same start always gives the same episode for the same actions, whatever was run before.
        """

    @abstractmethod
    def act(self, actions: Float32[np.ndarray, "N D"], running: Bool[np.ndarray, "N"]) -> None:
        """One control step of the worlds that are `running`; the others stay as they are."""

    @abstractmethod
    def look(self) -> Worlds:
        """How all worlds are now; the arrays are not written to later."""

    def num_starts(self, split: Split) -> int:
        """How many numbered start states each task has in `split`: as many as the configuration says."""
        return self.config.num_train_starts if split == "train" else self.config.num_eval_starts

    def replay(self, starts: Sequence[Start], actions: Sequence[Float32[np.ndarray, "k D"]]) -> Observation:
        """Bring each world to where its actions lead from its start.

        Raises:
            ValueError: the actions end an episode: they were not recorded in it.
        """
        self._check(starts)
        self._enter(np.arange(self.num_envs), starts)
        lengths = np.array([len(each) for each in actions])
        for step in range(int(lengths.max(initial=0))):
            running = lengths > step
            now = np.zeros((self.num_envs, self.action_dim), np.float32)
            now[running] = [each[step] for each in actions if len(each) > step]
            self.act(arriving_at_all(self._filters, now, running), running)
        self._steps = lengths.astype(np.int64)
        seen = self.look()
        if (over := (lengths > 0) & (seen.success | (self._steps >= self.config.max_steps))).any():
            raise ValueError(f"replayed actions end the episode {starts[int(np.argmax(over))]}")
        if seen.progress is not None:
            self._progress = seen.progress.copy()
        return self._observed(seen)

    def send(self, actions: Float32[np.ndarray, "N K D"], next_starts: Sequence[Start]) -> None:
        """Take note of a decision; `receive` carries it out."""
        self._check(next_starts)
        self._check_actions(actions, str(self.config.kind))
        check_finite("the policy's action", actions, np.ones(self.num_envs, bool), self._where())
        self._sent = actions, list(next_starts)

    def receive(self) -> EnvStep:
        """Carry out the decision that `send` took note of."""
        assert self._sent is not None, "send comes first"
        (actions, next_starts), self._sent = self._sent, None
        running, seen = np.ones(self.num_envs, bool), self.look()
        executed = np.zeros(self.num_envs, np.int32)
        for k in range(actions.shape[1]):
            self.act(arriving_at_all(self._filters, actions[:, k], running), running)
            executed += running
            self._steps += running
            seen = self.look()
            running &= ~seen.success & (self._steps < self.config.max_steps)
            if not running.any():
                break
        success = seen.success.copy()
        truncated = ~success & (self._steps >= self.config.max_steps)
        check_finite("ee_state (x, y, z, gripper)", seen.ee_state, np.ones(self.num_envs, bool), self._where())
        if seen.state is not None:
            check_finite("state", seen.state, np.ones(self.num_envs, bool), self._where())
        final, before = self._observed(seen), self._progress
        after = np.full(self.num_envs, np.nan, np.float32) if seen.progress is None else seen.progress
        self._progress = after.copy()
        ended = np.flatnonzero(success | truncated)
        if len(ended):
            self._enter(ended, [next_starts[n] for n in ended])
        return EnvStep(
            observation=self._observed(self.look()) if len(ended) else final,
            success=success,
            terminated=success.copy(),
            truncated=truncated,
            valid=np.ones(self.num_envs, bool),
            executed=executed,
            final_observation=final,
            ee_state=seen.ee_state,
            progress=np.stack([before, after], axis=1),
        )

    def close(self) -> None:
        """Nothing to free, unless a simulator says otherwise."""

    def _enter(self, rows: Int64[np.ndarray, "R"], starts: Sequence[Start]) -> None:
        self.begin(rows, starts)
        self._steps[rows] = 0
        for n, start in zip(rows.tolist(), starts, strict=True):
            self._starts[n] = start
            self._filters[n] = Filter.of(start, self.rest_action())
        progress = self.look().progress
        if progress is not None:
            self._progress[rows] = progress[rows]

    def rest_action(self) -> Float32[np.ndarray, "D"]:
        """The action that leaves a robot as it is: zeros, unless a simulator knows better."""
        return np.zeros(self.action_dim, np.float32)

    def _observed(self, seen: Worlds) -> Observation:
        images = seen_by_all(self._filters, seen.images, self._steps)
        said = [self._spoken(self.config, start) for start in self._starts if start is not None]
        return Observation(images=images, instructions=tuple(said), state=seen.state)

    def _where(self) -> list[str]:
        """What messages call each world."""
        return [
            f"environment {n} ({self.config.kind}, task {start.task!r}, {start.split} start {start.index}, step {step})"
            if start is not None
            else f"environment {n} ({self.config.kind})"
            for n, (start, step) in enumerate(zip(self._starts, self._steps.tolist(), strict=True))
        ]


def is_batched(kind: Any) -> bool:
    """Whether a class of environments steps many worlds itself."""
    return isinstance(kind, type) and issubclass(kind, BatchedEnv)
