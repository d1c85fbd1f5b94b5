"""Where the two halves of training live: actors that collect, a learner that scores and updates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from reachrl.algorithms.base import UpdateStats
from reachrl.config.ppo import PPOConfig
from reachrl.policies.base import Policy
from reachrl.types import Rewards, Rollout, Scored, Start


class Actors(Protocol):
    """Policy copies with their environments."""

    policy: Policy

    def load_weights(self, weights: "Weights") -> int:
        """Take the learner's weights; returns their version."""
        ...

    def collect(self, assign: Callable[[], Start], num_steps: int, on_step: Callable[[], None] | None) -> Rollout:
        """`num_steps` decisions in every environment with the loaded weights."""
        ...

    @property
    def lost_episodes(self) -> int:
        """Episodes lost with a dead or stuck worker since the run began."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, JSON-ready."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the running episodes."""
        ...

    def close(self) -> None:
        """Stop the environments."""
        ...


class Learner(Protocol):
    """The weights in training with their optimiser."""

    policy: Policy
    config: PPOConfig

    def export_weights(self) -> "Weights":
        """What the actors load."""
        ...

    def score(self, rollout: Rollout) -> Scored:
        """Log-probs and values of a rollout under the weights about to be trained."""
        ...

    def update(
        self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int, train_policy: bool
    ) -> UpdateStats:
        """One iteration of the algorithm."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state."""
        ...

    def load(self, folder: Path) -> None:
        """Read them back."""
        ...


class Weights(Protocol):
    """A version of the weights; how they travel is the backend's affair."""

    @property
    def version(self) -> int:
        """Grows by one with each update."""
        ...
