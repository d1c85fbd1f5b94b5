"""Options of the rewards; those of the process reward model itself are in `reward_model`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from reachrl.config.base import Section
from reachrl.config.marks import Affects


class TaskRewardConfig(Section):
    """The simulator's sparse success reward alone."""

    kind: Annotated[Literal["task"], Affects.TRAINING] = "task"
    """Which reward this section configures."""


class ProcessRewardConfig(Section):
    """The sparse success reward plus a reward for progress, scored by the fitted progress model."""

    kind: Annotated[Literal["process"], Affects.TRAINING] = "process"
    """Which reward this section configures."""

    weight: Annotated[float, Affects.FUTURE] = Field(default=0.5, ge=0)
    """How much process reward is added to the task reward (the paper: 1; a run never scores frames at 0)."""

    mode: Annotated[Literal["sum", "potential"], Affects.FUTURE] = "potential"
    """`sum` adds scores, as the paper does: of the frame each action led to, which pays an agent that dawdles in
    good-looking states, or once for each keyframe (`pay`). `potential` adds `gamma * score(next) - score(now)`, which
    cannot change the best policy."""

    pay: Annotated[Literal["steps", "segments", "keyframes"], Affects.TRAINING] = "steps"
    """When process reward is paid: after each decision; at the last one of each gripper segment and episode (the last
    decision of a rollout ends a segment too; potentials add up to the same whatever is cut where); or, with
    `mode=sum`, once for each keyframe reached: what a score exceeds the episode's highest so far."""

    gripper_change: Annotated[float, Affects.TRAINING] = Field(default=0.15, gt=0, le=1)
    """Smallest change of gripper opening that ends a segment (`pay=segments`)."""

    min_segment: Annotated[int, Affects.TRAINING] = Field(default=3, ge=1)
    """Decisions a new gripper state must last to count (`pay=segments`)."""

    normalise: Annotated[bool, Affects.TRAINING] = False
    """Divide the process reward by its running standard deviation before it is weighted; an episode keeps the number
    that was in force in the rollout in which it began."""

    clip: Annotated[float | None, Affects.FUTURE] = Field(default=None, gt=0)
    """Largest size of one step's process reward before it is weighted; a clipped potential may change the best
    policy."""

    device: Annotated[str, Affects.FUTURE] = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where frames are scored: `cpu`, `cuda`, `cuda:1`; `auto` is where the model was put, the run's device."""

    checkpoint: Annotated[Path | None, Affects.TRAINING] = None
    """A fitted model's folder to score with; empty: the one this run's reward stage fits."""

    score_batch: Annotated[int, Affects.FUTURE] = Field(default=128, ge=1)
    """Frames scored at once. Short batches are padded to it, so that a score never depends on its neighbours."""

    @model_validator(mode="after")
    def _keyframes_are_summed(self) -> Self:
        if self.pay == "keyframes" and self.mode != "sum":
            raise ValueError(
                "reward.pay=keyframes pays rises of the score, which no potential does: set reward.mode=sum, or "
                "reward.pay=steps"
            )
        return self


class OracleRewardConfig(Section):
    """The sparse success reward plus the simulator's own progress as a potential: an upper bound for reward models."""

    kind: Annotated[Literal["oracle"], Affects.TRAINING] = "oracle"
    """Which reward this section configures."""

    weight: Annotated[float, Affects.FUTURE] = Field(default=0.5, ge=0)
    """How much of the progress is added to the task reward."""
