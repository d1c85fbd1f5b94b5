"""Where a run's training computes: in this process, or in many on one machine or a cluster.

None of these options decides a number, so a run may be resumed with others.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from reachrl.config.base import Section
from reachrl.config.marks import Affects

Count = Annotated[int, Field(ge=1)]


class BackendSection(Section):
    """What every backend knows."""

    kind: Annotated[str, Affects.SPEED]
    """Which backend: a built-in name or `package.module:Class`."""
    env_groups: Annotated[Count, Affects.SPEED] = 1
    """Groups that the environments of one actor are stepped in: while the simulators of one group step, the actions of
    the next are decoded. Two pay off where decoding and simulation take about as long as each other."""
    sharding: Annotated[Literal["none", "full"], Affects.SPEED] = "none"
    """With several learner processes: `full` splits weights, gradients and optimiser over them (FSDP2); `none` leaves
    each of them whole ones."""


class LocalBackendConfig(BackendSection):
    """One process, or as many learners as `torchrun` starts."""

    kind: Literal["local"] = "local"  # pyright: ignore[reportIncompatibleVariableOverride]
    evaluator_envs: Annotated[int, Field(ge=0), Affects.SPEED] = 0
    """Environments of a process that evaluates beside training with a copy of the policy, on cores that training leaves
    idle (`eval.during_every`); 0: training waits while its own process evaluates."""


class RayBackendConfig(BackendSection):
    """Learners, actors with environments and reward workers as Ray actors. Needs the extra `ray`."""

    kind: Literal["ray"] = "ray"  # pyright: ignore[reportIncompatibleVariableOverride]
    address: Annotated[str | None, Affects.SPEED] = None
    """A running cluster's address, `auto` for the one this machine belongs to; none starts Ray on this machine for the
    time of the run. The run folder must then be on storage that every machine sees."""
    learners: Annotated[Count, Affects.SPEED] = 1
    """Processes that share the learner's work, one GPU each."""
    actors: Annotated[Count, Affects.SPEED] = 1
    """Processes that collect, one GPU each; `env.num_envs` is shared out among them."""
    reward_workers: Annotated[int, Field(ge=0), Affects.SPEED] = 0
    """Processes that score frames with the reward model, beside the learner; 0: the training process does."""
    evaluator_envs: Annotated[Count, Affects.SPEED] = 8
    """Environments of the process that evaluates during training, with `eval.during_every`."""
    placement: Annotated[Literal["split", "colocated"], Affects.SPEED] = "split"
    """`split`: actors and learners have GPUs of their own; `colocated`: actor i shares the GPU of learner i, and each
    hands the memory over when it is the other's turn."""
    cpus_per_actor: Annotated[float, Field(gt=0), Affects.SPEED] = 1.0
    """Cores to reserve for each actor with its simulators; on a cluster."""
    rebalance: Annotated[bool, Affects.SPEED] = True
    """Share environments out anew when the measured step times of the actors say that it saves a tenth of the time."""
    deadline_s: Annotated[float, Field(gt=0), Affects.SPEED] = 1800.0
    """A process that has not finished one piece of work (a rollout, an update) after so long is taken for dead."""
    max_restarts: Annotated[int, Field(ge=0), Affects.SPEED] = 3
    """How often in a row an actor, a reward worker or the evaluator is replaced before the run gives up; and how often
    a run goes on from its last checkpoint, with new processes, after a learner was lost."""

    @field_validator("address")
    @classmethod
    def _no_client(cls, address: str | None) -> str | None:
        if address is not None and address.startswith("ray://"):
            raise ValueError(
                "Ray's client does not carry what training needs: run the command on a machine of the cluster with "
                "address=auto, or give host:port"
            )
        return address

    @model_validator(mode="after")
    def _pairs_where_colocated(self) -> Self:
        if self.placement == "colocated" and self.actors != self.learners:
            raise ValueError(
                f"placement=colocated puts one actor beside each learner, but actors={self.actors} and "
                f"learners={self.learners}: set them equal, or placement=split"
            )
        return self
