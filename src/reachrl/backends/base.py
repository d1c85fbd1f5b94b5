"""Interfaces of a backend: actors that collect rollouts, a learner that scores and updates, an evaluator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from reachrl.config.backend import BackendSection
from reachrl.config.train import TrainConfig
from reachrl.policies.base import Policy
from reachrl.rewards.process.scorer import FrameScoring
from reachrl.rollout.collector import Assign
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.spans import Span
from reachrl.types import Rewards, Rollout, Scored, Start

T = TypeVar("T")


class Pending(Generic[T]):
    """A future: `result()` waits for work in another process, or returns what this process has done already.

    Args:
        wait: returns the result.
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        self.result = wait

    @classmethod
    def done(cls, result: T) -> "Pending[T]":
        """A future of finished work."""
        return cls(lambda: result)


class Actors(Protocol):
    """Policy copies with their environments."""

    def load_weights(self, weights: "Weights") -> int:
        """Load the learner's weights; return their version."""
        ...

    def collect(self, assign: Assign, num_steps: int) -> Pending[Rollout]:
        """Begin `num_steps` decisions in every environment with the loaded weights."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures for the metrics log; `lost_episodes` counts those lost with a dead or stuck simulator."""
        ...

    def take_spans(self) -> list[Span]:
        """Timing spans recorded since the last call."""
        ...

    def balance(self) -> list[dict[str, Any]]:
        """How the environments are shared out: actor, host, rows, seconds per step, busy share; [] for one process."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The running episodes by environment, JSON-ready."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the running episodes."""
        ...

    def close(self) -> None:
        """Stop the environments."""
        ...


class Learner(Protocol):
    """The weights in training with their optimiser."""

    @property
    def version(self) -> int:
        """Version of the weights; grows by one with each update."""
        ...

    def export_weights(self) -> "Weights":
        """What the actors load."""
        ...

    def score(self, rollout: Rollout) -> Pending[Scored]:
        """Begin to compute log-probs and values of a rollout under the weights about to be trained."""
        ...

    def update(self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int) -> dict[str, float]:
        """One iteration of the algorithm on the rollout that was scored last; its figures, with `engine_kl`."""
        ...

    def take_spans(self) -> list[Span]:
        """Timing spans recorded since the last call."""
        ...

    def save(self, folder: Path) -> None:
        """Write `policy/` and the algorithm's state, in the same files however many processes share the work."""
        ...

    def load(self, folder: Path, *, version: int) -> None:
        """Read what `save` wrote, as weights of `version`."""
        ...

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone."""
        ...

    def close(self) -> None:
        """End the processes that share the work."""
        ...


class Evaluator(Protocol):
    """Plays held-out episodes during training."""

    def play(self, weights: "Weights", starts: Sequence[Start], mode: str) -> Pending[list[PlayedEpisode]]:
        """Begin to play every start once with these weights; `mode` names the temperature."""
        ...

    def take_spans(self) -> list[Span]:
        """Timing spans recorded since the last call."""
        ...


class Weights(Protocol):
    """A version of the weights. The representation (shared object or packed buckets) is backend-specific."""

    @property
    def version(self) -> int:
        """Grows by one with each update."""
        ...


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The learner's own policy object: within one process nothing is copied."""

    version: int
    policy: Policy


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors, learner, evaluator and reward workers of one training loop."""

    actors: Actors
    learner: Learner
    scoring: FrameScoring | None = None  # who runs the reward model; None: the loop's own process
    evaluator: Evaluator | None = None  # None: no evaluation during training

    def take_spans(self) -> list[Span]:
        """Timing spans recorded since the last call."""
        parts = (self.actors, self.learner, self.scoring, self.evaluator)
        return [span for part in parts if part is not None for span in part.take_spans()]


class Backend(ABC):
    """Starts the workers of a training loop.

    Args:
        config: the `backend` section.
    """

    Config: ClassVar[type[BackendSection]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def max_restarts(self) -> int:
        """How often a run may restart from its last checkpoint with new workers after a learner was lost."""
        return 0

    @abstractmethod
    def open(self, config: TrainConfig, warm: Path) -> AbstractContextManager[Workers]:
        """Workers for the run of `config`, whose policy begins from the one saved in `warm`.

        Inside the context, the loss of a learner raises LearnerLostError. Leaving it ends every started process.

        Raises:
            ConfigError: not enough machines, or a folder that they cannot see.
            MissingExtra: the backend's package is not installed.
        """
