"""What runs inside the Ray actors: a process that collects, one that learns, one that scores frames."""

import gc
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError

from reachrl.algorithms.base import UpdateStats
from reachrl.backends.building import device_of, saved_policy, warm_policy
from reachrl.backends.data_parallel import LeadingLearner, follow
from reachrl.backends.group import Group
from reachrl.backends.learner import LocalLearner
from reachrl.backends.local import LocalActors, LocalEvaluator, open_groups
from reachrl.backends.weights import PackedWeights, load_packed
from reachrl.config.backend import RayBackendConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import LearnerLostError
from reachrl.policies.base import Policy
from reachrl.rewards.process.base import RewardModel
from reachrl.rollout.collector import Assign
from reachrl.rollout.episodes import Mode, PlayedEpisode
from reachrl.run.spans import Span
from reachrl.types import Rewards, Rollout, Scored, Start

_OFFER_TIMEOUT_S = 60.0  # offers are made before anyone is told to fetch them


@dataclass(frozen=True, slots=True)
class Collected:
    """What an actor answers."""

    rollout: Rollout
    rows: list[dict[str, Any]]  # the running episodes of its environments afterwards
    lost_episodes: int  # since it got its environments
    gap: float  # between its log-probs and the learner's
    seconds: float
    spans: list[Span]


class _Offers:
    """Rollouts that the training process has offered to this learner, until it takes them."""

    def __init__(self) -> None:
        self._changed, self._rollouts = threading.Condition(), dict[int, Rollout]()

    def put(self, number: int, rollout: Rollout) -> None:
        with self._changed:
            self._rollouts = {number: rollout}  # one that nobody took belongs to a call that failed
            self._changed.notify_all()

    def take(self, number: int) -> Rollout:
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._rollouts, timeout=_OFFER_TIMEOUT_S):
                raise LearnerLostError(f"rollout {number} did not reach a learner within {_OFFER_TIMEOUT_S:g} s")
            return self._rollouts.pop(number)


_OFFERS = _Offers()  # one learner in each process


@dataclass(frozen=True, slots=True)
class Offered:
    """Stands for a rollout that every learner was offered: what the leader tells its followers to fetch."""

    number: int

    def fetch(self) -> Rollout:
        """The rollout itself, in this process."""
        return _OFFERS.take(self.number)


class ActorProcess:
    """Acts with a copy of the policy in environments of its own.

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
        """Step the environments `first` to `first + count` from now on, with the episodes that run there.

        Returns:
            The name of this machine.
        """
        config = self._config
        assert isinstance(config.ppo, PPOConfig)
        if self._policy is None:
            _prepare(config)
            self._policy = saved_policy(config, self._warm).eval()
        if self._actors is not None:
            self._actors.close()
        self._actors = LocalActors(
            self._policy,
            open_groups(config.env, count, config.backend.env_groups),
            seed=config.seed,
            temperature=config.ppo.temperature,
            train_vision=config.ppo.train_vision,
            first=first,
            total=config.env.num_envs,
            name=f"actor {self._number}",
        )
        self._actors.load_state_dict({"lost_episodes": 0, "rows": list(rows)})
        return socket.gethostname()

    def load_weights(self, weights: PackedWeights) -> None:
        """Take weights whose buckets lie in the object store.

        Raises:
            LearnerLostError: they went with the learner that put them there.
        """
        assert self._actors is not None and self._policy is not None
        if self._hands_over:
            self._policy.to(device_of(self._config))
        self._actors.load_weights(_fetched(weights))

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
            self._actors.policy.close()


class EvaluatorProcess:
    """Plays held-out episodes with a copy of the policy.

    Args:
        config: the run's.
        warm: folder of the policy that the run began from; trained weights are sent on top of it.
    """

    def __init__(self, config: TrainConfig, warm: Path) -> None:
        self._config, self._warm = config, warm
        self._policy: Policy | None = None

    def play(self, weights: PackedWeights, starts: Sequence[Start], mode: Mode) -> tuple[list[PlayedEpisode], Span]:
        """Play every start once with weights whose buckets lie in the object store."""
        config = self._config
        assert isinstance(config.backend, RayBackendConfig) and isinstance(config.ppo, PPOConfig)
        if self._policy is None:
            _prepare(config)
            self._policy = saved_policy(config, self._warm).eval()
        load_packed(self._policy, _fetched(weights), train_vision=config.ppo.train_vision)
        evaluator = LocalEvaluator(self._policy, config)
        episodes = evaluator.play_now(starts, mode, min(config.backend.evaluator_envs, len(starts)))
        return episodes, evaluator.take_spans()[0]


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
        self._learner: LocalLearner | LeadingLearner | None = None
        self._rollout: Rollout | None = None  # that was scored last

    def sees(self, path: Path) -> bool:
        """Whether a file is there, as this process sees it."""
        return path.exists()

    def address(self) -> tuple[str, int]:
        """Where the processes can meet: this machine, at a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def lead(self, address: tuple[str, int]) -> None:
        """Meet the others and give them this process's weights."""
        _prepare(self._config)
        learner, group = self._join(address)
        self._learner = learner
        if not group.alone:
            self._learner = LeadingLearner(learner, group, image_size=self._config.env.image_size)

    def follow(self, address: tuple[str, int]) -> None:
        """Meet the others and do as the leader does, until it ends."""
        _prepare(self._config)
        learner, group = self._join(address)
        follow(learner, group)

    def _join(self, address: tuple[str, int]) -> tuple[LocalLearner, Group]:
        config = self._config
        assert isinstance(config.ppo, PPOConfig)
        os.environ |= {"RANK": str(self._rank), "WORLD_SIZE": str(self._size)}
        os.environ |= {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
        group = Group.from_environment(sharded=config.backend.sharding == "full")
        policy = warm_policy(config, self._warm)
        whole = None
        if group.sharded and self._rank == 0:  # what is saved: in main memory, where there is room
            whole = warm_policy(config, self._warm, torch.device("cpu"))
        return LocalLearner(policy, config.ppo, seed=config.seed, group=group, whole=whole), group

    def pack_weights(self) -> PackedWeights:
        """The weights with their buckets in the object store."""
        learner = self._learner
        assert learner is not None
        size = self._config.env.image_size
        packed = (
            learner.pack_weights() if isinstance(learner, LeadingLearner) else learner.pack_weights(image_size=size)
        )
        stored = tuple(ray.put(bucket) for bucket in packed.buckets)
        if self._hands_over:
            learner.hand_over()
        return replace(packed, buckets=stored)

    @ray.method(concurrency_group="offers")
    def offer(self, number: int, rollout: Rollout) -> None:
        """Lay a rollout ready; runs beside `follow`."""
        _OFFERS.put(number, rollout)

    def score(self, number: int) -> Scored:
        """Log-probs and values of an offered rollout."""
        assert self._learner is not None
        self._rollout = _OFFERS.take(number)
        if isinstance(self._learner, LeadingLearner):
            return self._learner.score(self._rollout, told=Offered(number)).result()
        return self._learner.score(self._rollout).result()

    def update(
        self, rewards: Rewards, scored: Scored, iteration: int, train_policy: bool
    ) -> tuple[UpdateStats, list[Span]]:
        """One iteration of the algorithm on the rollout that was scored last."""
        assert self._learner is not None and self._rollout is not None
        stats = self._learner.update(self._rollout, rewards, scored, iteration=iteration, train_policy=train_policy)
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
        """Let the followers end."""
        if self._learner is not None:
            self._learner.close()


class RewardProcess:
    """Scores frames with a copy of the reward model.

    Args:
        config: the run's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._model: RewardModel | None = None

    def take_model(self, model: RewardModel) -> None:
        """Score with this model from now on."""
        _prepare(self._config)
        wanted = getattr(self._config.reward, "device", "auto")
        self._model = model.to(device_of(self._config) if wanted == "auto" else torch.device(wanted)).eval()

    def score(
        self, clips: np.ndarray, instructions: Sequence[str], batch_size: int
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """P(progress) f32[B] of clips u8[B F H W 3], and when it was computed."""
        assert self._model is not None
        began = time.time()
        return self._model.score(clips, instructions, batch_size=batch_size), (began, time.time())


def _fetched(weights: PackedWeights) -> PackedWeights:
    """Weights whose buckets are here.

    Raises:
        LearnerLostError: they went with the learner that put them into the object store.
    """
    references: list[Any] = list(weights.buckets)
    try:
        return replace(weights, buckets=tuple(ray.get(references)))
    except ObjectLostError as error:
        lost = f"weights version {weights.version} were lost with the learner that sent them"
        raise LearnerLostError(lost) from error


def _prepare(config: TrainConfig) -> None:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
