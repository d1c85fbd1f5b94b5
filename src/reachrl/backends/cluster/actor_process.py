"""The actor that collects, as it runs inside a Ray actor."""

import gc
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reachrl.backends.cluster.transfer import fetched
from reachrl.backends.local import LocalActors, open_groups
from reachrl.backends.policy_loading import device_of, limit_threads, saved_policy
from reachrl.backends.weights import PackedWeights
from reachrl.config.backend import RayBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.envs.base import Shown
from reachrl.policies.base import Policy
from reachrl.rollout.collector import Assign
from reachrl.run.spans import Span
from reachrl.types import Rollout


@dataclass(frozen=True, slots=True)
class Collected:
    """An actor's part of a rollout, with its state and timing."""

    rollout: Rollout
    rows: list[dict[str, Any]]  # the running episodes of its environments afterwards
    lost_episodes: int  # since it got its environments
    gap: float  # between its log-probs and the learner's
    seconds: float
    spans: list[Span]


class ActorProcess:
    """Collects with a copy of the policy in its own environments.

    Args:
        config: the run's.
        warm: folder of the policy that the run began from; trained weights are sent on top of it.
        number: of this actor.
    """

    def __init__(self, config: TrainConfig, warm: Path, number: int) -> None:
        assert isinstance(config.backend, RayBackendConfig)
        self._config, self._warm, self._number = config, warm, number
        self._hands_over = config.backend.placement == "colocated"
        # Nothing that may fail is done here: Ray keeps only the text of what a constructor raises.
        self._policy: Policy | None = None
        self._actors: LocalActors | None = None

    def take_rows(self, first: int, count: int, rows: Sequence[dict[str, Any]]) -> str:
        """Take over the environments `first` to `first + count` with their running episodes.

        Returns:
            The name of this machine.
        """
        config = self._config
        if self._policy is None:
            limit_threads(config)
            self._policy = saved_policy(config, self._warm).eval()
        if self._actors is not None:
            self._actors.close()
        self._actors = LocalActors(
            self._policy,
            open_groups(config.env, count, config.backend.env_groups),
            seed=config.seed,
            temperature=config.rollout.temperature,
            train_vision=config.algorithm.train_vision,
            first=first,
            total=config.env.num_envs,
            name=f"actor {self._number}",
            needs=config.algorithm.needs,
            max_steps=config.env.max_steps,
            vary=config.env.varied,
        )
        self._actors.load_state_dict({"lost_episodes": 0, "rows": list(rows)})
        return socket.gethostname()

    def shown(self) -> Shown:
        """What the environments show."""
        assert self._actors is not None
        return self._actors.groups[0].shown

    def load_weights(self, weights: PackedWeights) -> None:
        """Load weights whose buckets are in Ray's object store.

        Raises:
            LearnerLostError: the learner that stored them is gone.
        """
        assert self._actors is not None and self._policy is not None
        if self._hands_over:
            self._policy.to(device_of(self._config))
        self._actors.load_weights(fetched(weights))

    def collect(self, assign: Assign, num_steps: int) -> Collected:
        """`num_steps` decisions in every environment."""
        actors, began = self._actors, time.perf_counter()
        assert actors is not None and self._policy is not None
        rollout = actors.collect(assign, num_steps).result()
        seconds, state, figures = time.perf_counter() - began, actors.state_dict(), actors.metrics()
        if self._hands_over and self._policy.device.type != "cpu":
            self._policy.to("cpu")
            gc.collect()
            torch.cuda.empty_cache()
        return Collected(
            rollout=rollout,
            rows=state["rows"],
            lost_episodes=state["lost_episodes"],
            gap=figures["weight_sync/gap"],
            seconds=seconds,
            spans=actors.take_spans(),
        )

    def close(self) -> None:
        """Stop the environments."""
        if self._actors is not None:
            self._actors.close()
