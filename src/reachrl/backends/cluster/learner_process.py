"""One of the learners, as it runs inside a Ray actor."""

import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import ray
import torch

from reachrl.backends.data_parallel import follow
from reachrl.backends.group import Group
from reachrl.backends.learner import LocalLearner, new_learner
from reachrl.backends.policy_loading import limit_threads, warm_policy
from reachrl.backends.weights import PackedWeights
from reachrl.config.backend import RayBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.envs.base import Shown
from reachrl.errors import LearnerLostError
from reachrl.run.spans import Span
from reachrl.types import Rewards, Rollout, Scored

_OFFER_TIMEOUT_S = 60.0  # offers are made before anyone is told to fetch them


class OfferedRollouts:
    """Rollouts that the training process has offered to this learner, until it takes them."""

    def __init__(self) -> None:
        self._changed, self._rollouts = threading.Condition(), dict[int, Rollout]()

    def put(self, number: int, rollout: Rollout) -> None:
        """Store a rollout. One that was never taken is dropped: it belongs to a failed call."""
        with self._changed:
            self._rollouts = {number: rollout}
            self._changed.notify_all()

    def take(self, number: int) -> Rollout:
        """Wait for a rollout and remove it from here.

        Raises:
            LearnerLostError: it was not offered in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._rollouts, timeout=_OFFER_TIMEOUT_S):
                raise LearnerLostError(f"rollout {number} did not reach a learner within {_OFFER_TIMEOUT_S:g} s")
            return self._rollouts.pop(number)


class LearnerProcess:
    """One of the processes that train; the first leads.

    Args:
        config: the run's.
        warm: folder of the policy that the run began from.
        rank: of this process; 0 leads.
    """

    def __init__(self, config: TrainConfig, warm: Path, rank: int) -> None:
        assert isinstance(config.backend, RayBackendConfig)
        self._config, self._warm, self._rank, self._size = config, warm, rank, config.backend.learners
        self._hands_over = config.backend.placement == "colocated"
        self._learner: LocalLearner | None = None
        self._offers = OfferedRollouts()
        self._rollout: Rollout | None = None  # that was scored last

    def sees(self, path: Path) -> bool:
        """Whether a file is there, as this process sees it."""
        return path.exists()

    def address(self) -> tuple[str, int]:
        """Address of the process group's rendezvous: this machine and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def lead(self, address: tuple[str, int]) -> None:
        """Join the process group as rank 0 and broadcast this process's weights."""
        limit_threads(self._config)
        self._learner, _ = self._join(address)
        self._learner.lead()

    def follow(self, address: tuple[str, int]) -> None:
        """Join the process group and repeat the leader's calls until it ends."""
        limit_threads(self._config)
        learner, group = self._join(address)
        follow(learner, group, self._offers.take)

    def _join(self, address: tuple[str, int]) -> tuple[LocalLearner, Group]:
        config = self._config
        os.environ |= {"RANK": str(self._rank), "WORLD_SIZE": str(self._size)}
        os.environ |= {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
        group = Group.from_environment(sharded=config.backend.sharding == "full")
        policy = warm_policy(config, self._warm)
        whole = None
        if group.sharded and self._rank == 0:  # what is saved: in main memory, where there is room
            whole = warm_policy(config, self._warm, torch.device("cpu"))
        return new_learner(config, policy, group, whole), group

    def pack_weights(self, shown: Shown) -> PackedWeights:
        """The weights with their buckets in the object store; `shown` by the environments of those who get them."""
        learner = self._learner
        assert learner is not None
        packed = learner.pack_weights(shown=shown)
        stored = tuple(ray.put(bucket) for bucket in packed.buckets)
        if self._hands_over:
            learner.hand_over()
        return replace(packed, buckets=stored)

    @ray.method(concurrency_group="offers")
    def offer(self, number: int, rollout: Rollout) -> None:
        """Store a rollout for `score`; runs concurrently with `follow`."""
        self._offers.put(number, rollout)

    def score(self, number: int) -> Scored:
        """Log-probs and values of an offered rollout."""
        assert self._learner is not None
        self._rollout = self._offers.take(number)
        return self._learner.score(self._rollout, number=number).result()

    def update(self, rewards: Rewards, scored: Scored, iteration: int) -> tuple[dict[str, float], list[Span]]:
        """One iteration of the algorithm on the rollout that was scored last."""
        assert self._learner is not None and self._rollout is not None
        stats = self._learner.update(self._rollout, rewards, scored, iteration=iteration)
        self._rollout = None
        return stats, self._learner.take_spans()

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state."""
        assert self._learner is not None
        self._learner.save(folder)

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone."""
        assert self._learner is not None
        self._learner.save_policy(folder)

    def load(self, folder: Path, version: int) -> None:
        """Read weights and optimiser state."""
        assert self._learner is not None
        self._learner.load(folder, version=version)

    def close(self) -> None:
        """End the followers."""
        if self._learner is not None:
            self._learner.close()
