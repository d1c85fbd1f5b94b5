"""Which processes share a run's work, and how much of it each of them has."""

import math
from dataclasses import dataclass, replace

from reachrl.config.backend import RayBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLayout:
    """The processes of a run as its `backend` section has them, and the rows that come to one of each."""

    environments: int
    decisions: int  # of an iteration
    learners: int = 1
    actors: int = 1
    groups: int = 1  # of an actor's environments, decoded one after the other
    sharded: bool = False
    alone: bool = True  # one process acts and learns with one policy
    colocated: bool = False  # an actor beside each learner

    @property
    def pieces(self) -> int:
        """Learners over which weights, gradients and optimiser states are split."""
        return self.learners if self.sharded else 1

    @property
    def decoded_rows(self) -> int:
        """Environments whose actions an actor decodes together."""
        return math.ceil(math.ceil(self.environments / self.actors) / self.groups)

    @property
    def block(self) -> int:
        """Decisions of an iteration that a learner scores, and whose vision features it keeps."""
        return math.ceil(self.decisions / self.learners)


def least_environments(config: TrainConfig) -> int:
    """So many give every group of every actor an environment, and every learner a decision."""
    backend, learners, actors = config.backend, 1, 1
    if isinstance(backend, RayBackendConfig):
        learners, actors = backend.learners, backend.actors
    return max(actors * backend.env_groups, math.ceil(learners / config.rollout.num_steps))


def layout_of(config: TrainConfig) -> ProcessLayout:
    """The processes of a run; a backend other than Ray's is taken for one process.

    Raises:
        ConfigError: there are too few environments for all of them, which ends a run as it starts, too.
    """
    least, backend = least_environments(config), config.backend
    if config.env.num_envs < least:
        raise ConfigError(
            f"the processes of `backend` need {least} environments, but env.num_envs={config.env.num_envs}: raise it, "
            "or lower backend.actors, backend.env_groups or backend.learners"
        )
    layout = ProcessLayout(
        environments=config.env.num_envs,
        decisions=config.rollout.num_steps * config.env.num_envs,
        groups=backend.env_groups,
    )
    if not isinstance(backend, RayBackendConfig):
        return layout
    return replace(
        layout,
        learners=backend.learners,
        actors=backend.actors,
        sharded=backend.sharding == "full" and backend.learners > 1,
        alone=False,
        colocated=backend.placement == "colocated",
    )
