"""Starts Ray, reserves resources and starts a run's processes."""

import logging
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from reachrl.backends.base import Backend, Workers
from reachrl.backends.cluster.actor_process import ActorProcess
from reachrl.backends.cluster.actors import ClusterActors
from reachrl.backends.cluster.calls import Lost, Remote
from reachrl.backends.cluster.evaluator import ClusterEvaluator
from reachrl.backends.cluster.evaluator_process import EvaluatorProcess
from reachrl.backends.cluster.learner import ClusterLearner
from reachrl.backends.cluster.learner_process import LearnerProcess
from reachrl.backends.cluster.reward_process import RewardProcess
from reachrl.backends.cluster.rewards import ClusterScoring
from reachrl.child import search_path
from reachrl.config.backend import RayBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError, LearnerLostError
from reachrl.home import home_variables

log = logging.getLogger(__name__)

_RESERVE_S = 60.0  # how long to wait until the cluster has room


class RayBackend(Backend):
    """Learners, actors and reward workers as Ray actors."""

    Config: ClassVar[type[RayBackendConfig]] = RayBackendConfig
    config: RayBackendConfig

    @property
    def max_restarts(self) -> int:
        """How often a run may go on from its last checkpoint."""
        return self.config.max_restarts

    @contextmanager
    def open(self, config: TrainConfig, warm: Path) -> Iterator[Workers]:
        """Start all processes; on exit end them, and Ray too if it was started here."""
        least = self.config.actors * self.config.env_groups
        if config.env.num_envs < least:
            raise ConfigError(
                f"backend.actors={self.config.actors} with backend.env_groups={self.config.env_groups} need {least} "
                f"environments, but env.num_envs={config.env.num_envs}: raise it, or lower one of the others"
            )
        if config.rollout.num_steps * config.env.num_envs < self.config.learners:
            raise ConfigError(
                f"backend.learners={self.config.learners}, but an iteration has {config.rollout.num_steps} x "
                f"{config.env.num_envs} decisions to share out among them: lower it"
            )
        bundles = reservation(self.config, gpus=False, evaluator=True)
        started = _start_ray(self.config, cpus=math.ceil(sum(bundle["CPU"] for bundle in bundles)))
        layout: ProcessLayout | None = None
        try:
            layout = ProcessLayout(config, self.config, warm.absolute())
            yield layout.workers()
        finally:
            if layout is not None:
                layout.close()
            if started:
                ray.shutdown()


def reservation(config: RayBackendConfig, *, gpus: bool, evaluator: bool) -> list[dict[str, float]]:
    """Resource bundles of the placement group: learners (with actors if colocated), actors, reward workers, evaluator.

    Args:
        config: the section.
        gpus: whether the cluster has GPUs; then every bundle gets one.
        evaluator: whether to reserve a bundle for an evaluator.
    """
    gpu = {"GPU": 1.0} if gpus else {}
    if config.placement == "colocated":
        bundles = [{"CPU": 1.0 + config.cpus_per_actor} | gpu for _ in range(config.learners)]
    else:
        bundles = [{"CPU": 1.0} | gpu for _ in range(config.learners)]
        bundles += [{"CPU": config.cpus_per_actor} | gpu for _ in range(config.actors)]
    bundles += [{"CPU": 1.0} | gpu for _ in range(config.reward_workers)]
    return bundles + [{"CPU": config.cpus_per_actor} | gpu] * evaluator


class ProcessLayout:
    """The processes of one run.

    Args:
        config: the run's.
        backend: its section.
        warm: folder of the policy that the run begins from.
    """

    def __init__(self, config: TrainConfig, backend: RayBackendConfig, warm: Path) -> None:
        self._config, self._backend, self._warm = config, backend, warm
        self._gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        self._evaluates = config.eval.during_every > 0
        self._group = self._reserve()
        self._started: list[ClusterActors | ClusterLearner] = []

    def workers(self) -> Workers:
        """Start all processes and wait until they are ready.

        Raises:
            LearnerLostError: a learner was lost on the way.
            ConfigError: the leader does not see the run folder.
        """
        backend, most = self._backend, self._backend.max_restarts
        try:
            # All are started before the first is waited for: each imports for seconds.
            learners = [self._learner(rank) for rank in range(backend.learners)]
            collecting = [self._actor(number) for number in range(backend.actors)]
            scorers = [self._reward_worker(number) for number in range(backend.reward_workers)]
            self._check_storage(learners[0])
            actors = ClusterActors(
                collecting,
                self._actor,
                total=self._config.env.num_envs,
                least=backend.env_groups,
                max_losses=most,
                rebalance=backend.rebalance,
            )
            learner = ClusterLearner(learners, actors.shown)
            scoring = ClusterScoring(scorers, self._reward_worker, max_losses=most) if scorers else None
            evaluator = (
                ClusterEvaluator(self._evaluator(), self._evaluator, max_losses=most) if self._evaluates else None
            )
        except Lost as lost:
            raise LearnerLostError(f"{lost}, before anything was done") from lost
        self._started = [actors, learner]
        return Workers(actors=actors, learner=learner, scoring=scoring, evaluator=evaluator)

    def _check_storage(self, leader: Remote) -> None:
        """Check that the leader, which writes the checkpoints, sees the same run folder as this process.

        Raises:
            ConfigError: it does not.
        """
        with tempfile.NamedTemporaryFile(dir=self._warm.parent, prefix=".seen-") as token:
            if not leader.call("sees", Path(token.name)):
                raise ConfigError(
                    f"{leader.name} does not see {self._warm.parent}: put the run folder (--run) on storage that every "
                    "machine of the cluster has under the same path"
                )

    def close(self) -> None:
        """End every process and release the placement group."""
        for part in self._started:
            part.close()
        remove_placement_group(self._group)  # ends the processes that are still in it

    def _reserve(self) -> PlacementGroup:
        bundles = reservation(self._backend, gpus=self._gpus, evaluator=self._evaluates)
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(_RESERVE_S):
            remove_placement_group(group)
            have = {name: value for name, value in ray.cluster_resources().items() if name in ("CPU", "GPU")}
            raise ConfigError(
                f"the cluster has had no room for the run in {_RESERVE_S:g} s: it needs {bundles}, each on a machine; "
                f"the cluster has {have} in all. Lower backend.learners, backend.actors or backend.cpus_per_actor"
            )
        return group

    def _learner(self, rank: int) -> Remote:
        cores = 1.0
        return self._spawn(
            LearnerProcess, f"learner {rank}", rank, cores, self._config, self._warm, rank, groups={"offers": 1}
        )

    def _actor(self, number: int) -> Remote:
        colocated = self._backend.placement == "colocated"
        bundle = number if colocated else self._backend.learners + number
        cores = self._backend.cpus_per_actor
        return self._spawn(ActorProcess, f"actor {number}", bundle, cores, self._config, self._warm, number)

    def _reward_worker(self, number: int) -> Remote:
        before = self._backend.learners + (0 if self._backend.placement == "colocated" else self._backend.actors)
        return self._spawn(RewardProcess, f"reward worker {number}", before + number, 1.0, self._config)

    def _evaluator(self) -> Remote:
        bundles = reservation(self._backend, gpus=self._gpus, evaluator=True)
        cores = self._backend.cpus_per_actor
        return self._spawn(EvaluatorProcess, "evaluator", len(bundles) - 1, cores, self._config, self._warm)

    def _spawn(
        self, kind: type, name: str, bundle: int, cores: float, *arguments: Any, groups: dict[str, int] | None = None
    ) -> Remote:
        shared = self._backend.placement == "colocated" and bundle < self._backend.learners
        # Ray's own type says nothing of concurrency groups.
        remote_class: Any = ray.remote(concurrency_groups=groups)(kind) if groups else ray.remote(kind)  # pyright: ignore
        handle = remote_class.options(
            num_cpus=cores,
            num_gpus=(0.5 if shared else 1.0) if self._gpus else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            max_restarts=0,
        ).remote(*arguments)
        return Remote(name, handle, self._backend.deadline_s)


def _knock(address: str) -> None:
    """Check that a server listens at `host:port`: Ray itself would retry for minutes.

    Raises:
        OSError: there is none.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _start_ray(config: RayBackendConfig, *, cpus: int) -> bool:
    """Connect to the cluster, or start Ray here; return whether it was started here.

    Raises:
        ConfigError: there is no cluster at that address.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address is not None:
        try:
            _knock(config.address)
            ray.init(address=config.address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"backend.address={config.address}: no Ray cluster answers there, or it does not let us in ({error}). "
                "Start one with `ray start --head`, use address=auto on one of its machines (elsewhere Ray needs the "
                "cluster's RAY_AUTH_TOKEN), or leave the address out to run on this machine"
            ) from error
        return True
    # What plug-ins are found by must hold in the processes too.
    folders = search_path()
    variables = {"PYTHONPATH": os.pathsep.join(folder for folder in folders if os.pathsep not in folder)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default all are so low that simulators cannot be lower
    ray.init(
        num_cpus=cpus,  # reservations are for clusters: here the processes share what there is
        include_dashboard=False,
        runtime_env={"env_vars": variables | home_variables()},
        # PYTHONPATH cannot hold a folder with a colon in its name; Ray adds these in the process itself.
        job_config=JobConfig(_py_driver_sys_path=[folder for folder in folders if os.pathsep in folder]),
        **options,
    )
    return True
