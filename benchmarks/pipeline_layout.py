"""What the pipeline simulator is told: the stage times of a training pipeline, and how many of what work where."""

import math
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class Stages:
    """Measured times: `_s` in seconds, `_row_s` in seconds per row. A row is one decision of one environment."""

    decode_fixed_s: float = 0.0
    """One forward pass of the policy, whatever its number of rows."""
    decode_row_s: float = 0.0
    env_step_s: float = 0.0
    """Mean time on one core of one step of one environment."""
    env_step_cv: float = 0.0
    """Standard deviation of that time over its mean; log-normal."""
    env_wait_s: float = 0.0
    """Time of an environment step that takes no core."""
    step_fixed_s: float = 0.0
    """Collecting the answers of a group, whatever its size."""
    reward_row_s: float = 0.0
    """On one reward worker, or on one learner where there are none."""
    score_row_s: float = 0.0
    """Log-probabilities and values before the update, on one learner."""
    update_row_s: float = 0.0
    """Forward and backward in one epoch, on one learner."""
    learner_efficiency: float = 1.0
    """Speed of a learner among others over its speed alone, apart from the all-reduce; at most 1."""
    gradient_bytes: float = 0.0
    gradient_bytes_per_s: float = math.inf
    sync_fixed_s: float = 0.0
    sync_bytes: float = 0.0
    sync_bytes_per_s: float = math.inf
    handover_s: float = 0.0
    """Colocated: a device turns from actor to learner or back, which happens twice in an iteration."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise ValueError(f"{field.name} is {value}, but a measured time or size is 0 or more.")
        if not 0 < self.learner_efficiency <= 1:
            raise ValueError(f"learner_efficiency is {self.learner_efficiency}, but lies above 0 and at most at 1.")
        if not (self.gradient_bytes_per_s and self.sync_bytes_per_s):
            raise ValueError("a bandwidth is 0: nothing would ever arrive. Leave it out for an infinite one.")


@dataclass(frozen=True)
class Layout:
    """How many of what, and where. Actors fill the nodes in turn, `actors_per_node` on each."""

    rows: tuple[int, ...]
    """Environments of each actor."""
    num_steps: int
    """Decisions of each environment in a rollout."""
    cores: int
    """Of each node."""
    learners: int = 1
    actors_per_node: int = 1
    groups: int = 1
    """Parts that an actor's environments are split into, as evenly as possible."""
    epochs: int = 1
    minibatch: int = 256
    """Rows of an optimiser step, over all learners."""
    reward_workers: int = 0
    """Devices of their own that score rewards beside the learners' scores; 0: the learners do it, before."""
    placement: Literal["colocated", "split"] = "split"
    """Learners on the actors' devices, or on their own."""
    ahead: bool = False
    """The next rollout is collected while the learners work on the last one, with weights one update old."""
    decode_on_cpu: bool = False
    decode_cores: int = 1
    """Cores of the node that a forward pass takes from the simulators, with `decode_on_cpu`."""

    def __post_init__(self):
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"rows is {self.rows}: there is no actor, or one without environments.")
        for name in ("num_steps", "cores", "learners", "actors_per_node", "groups", "epochs", "minibatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but at least 1 is needed.")
        if self.reward_workers < 0:
            raise ValueError(f"reward_workers is {self.reward_workers}: 0 lets the learners score rewards.")
        if self.placement not in ("colocated", "split"):
            raise ValueError(f"placement is {self.placement!r}, not 'colocated' or 'split'.")
        if min(self.rows) < self.groups:
            raise ValueError(f"{min(self.rows)} environments of an actor cannot be split into {self.groups} groups.")
        if self.minibatch < self.learners:
            raise ValueError(f"a minibatch of {self.minibatch} rows leaves some of {self.learners} learners none.")
        if self.ahead and self.placement == "colocated":
            raise ValueError("ahead needs placement 'split': colocated devices learn or collect, never both at once.")
        if self.placement == "colocated" and self.learners > len(self.rows):
            raise ValueError(f"{self.learners} learners cannot be colocated with {len(self.rows)} actors.")
        if self.decode_on_cpu and not 1 <= self.decode_cores <= self.cores:
            raise ValueError(f"decode_cores is {self.decode_cores}, but a node has {self.cores} cores.")

    @property
    def nodes(self) -> list[tuple[int, ...]]:
        """The rows of the actors on each node."""
        size = self.actors_per_node
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]

    @property
    def decisions(self) -> int:
        """Rows of a rollout."""
        return sum(self.rows) * self.num_steps

    def group_rows(self, rows: int) -> list[int]:
        """Sizes of the groups of an actor with so many environments."""
        return [rows // self.groups + (group < rows % self.groups) for group in range(self.groups)]
