"""Processes of a run, and the rows that each of them computes."""

import math
from dataclasses import dataclass, replace

from reachrl.config.backend import RayBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The processes that the `backend` section configures, and the rows of one process of each kind."""

    environments: int
    decisions: int  # per iteration
    learners: int = 1
    actors: int = 1
    groups: int = 1  # groups of environments in an actor, decoded one after the other
    sharded: bool = False
    alone: bool = True  # one process acts and learns with the same policy object
    colocated: bool = False  # each learner shares its device with an actor

    @property
    def pieces(self) -> int:
        """Number of shards of weights, gradients and optimiser states."""
        return self.learners if self.sharded else 1

    @property
    def decoded_rows(self) -> int:
        """Rows of one decoding batch of an actor."""
        return math.ceil(math.ceil(self.environments / self.actors) / self.groups)

    @property
    def block(self) -> int:
        """Decisions per iteration that a learner scores and keeps the vision features of."""
        return math.ceil(self.decisions / self.learners)


def least_environments(config: TrainConfig) -> int:
    """Return the minimum number of environments: one for each group of each actor, one decision for each learner."""
    backend, learners, actors = config.backend, 1, 1
    if isinstance(backend, RayBackendConfig):
        learners, actors = backend.learners, backend.actors
    return max(actors * backend.env_groups, math.ceil(learners / config.rollout.num_steps))


def layout_of(config: TrainConfig) -> Layout:
    """Return the processes of a run; every backend except Ray counts as one process.

    Raises:
        ConfigError: there are too few environments for all of them; such a run cannot start either.
    """
    least, backend = least_environments(config), config.backend
    if config.env.num_envs < least:
        raise ConfigError(
            f"the processes of `backend` need {least} environments, but env.num_envs={config.env.num_envs}: raise it, "
            "or lower backend.actors, backend.env_groups or backend.learners"
        )
    layout = Layout(
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
