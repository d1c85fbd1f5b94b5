"""Options of the rewards and of fitting the process reward model."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from reachrl.config.base import Section

ProgressMeasure = Literal["time", "distance", "segments"]


class TaskRewardConfig(Section):
    """The simulator's sparse success reward alone."""

    kind: Literal["task"] = "task"
    """Which reward this section configures."""


class ProcessRewardConfig(Section):
    """The sparse success reward plus a reward for progress, scored by the fitted progress model."""

    kind: Literal["process"] = "process"
    """Which reward this section configures."""

    weight: float = Field(default=0.5, ge=0)
    """How much process reward is added to the task reward (the paper: 1; a run never scores frames at 0)."""

    mode: Literal["sum", "potential"] = "potential"
    """`sum` adds the score of the frame each action led to (the paper; it pays an agent that dawdles in
    good-looking states). `potential` adds `gamma * score(next) - score(now)`, which cannot change the best policy."""

    checkpoint: Path | None = None
    """A fitted model's folder to score with; empty: the one this run's reward stage fits."""

    score_batch: int = Field(default=128, ge=1)
    """Frames scored at once. Short batches are padded to it, so that a score never depends on its neighbours."""


class OracleRewardConfig(Section):
    """The sparse success reward plus the simulator's own progress as a potential: an upper bound for reward models."""

    kind: Literal["oracle"] = "oracle"
    """Which reward this section configures."""

    weight: float = Field(default=0.5, ge=0)
    """How much of the progress is added to the task reward."""


class RewardModelSection(Section):
    """How trajectories are labelled with progress and how the progress model is fitted to the labels."""

    label: Literal["progress", "keyframe"] = "progress"
    """`progress`: how much of a successful trajectory is behind a frame, 0 in failed ones. `keyframe`: the
    paper's 1 for frames that lead into a keyframe and 0 elsewhere."""

    progress_by: ProgressMeasure = "time"
    """What progress is the share of: the trajectory's decisions (`time`), the way its end effector travelled
    (`distance`), or its gripper segments, each worth the same (`segments`)."""

    gripper_change: float = Field(default=0.15, gt=0, le=1)
    """Smallest change of gripper opening (0 closed .. 1 open) within a trajectory that cuts it into segments."""

    min_segment: int = Field(default=3, ge=1)
    """Frames a new gripper state must last to count; shorter flips are chatter."""

    keyframe_speed: float = Field(default=0.15, gt=0, lt=1)
    """End-effector speed, as a fraction of the trajectory's fast motion, below which it has come to rest."""

    keyframe_window: int = Field(default=3, ge=1)
    """Frames labelled positive for each keyframe: the keyframe and those just before it (label `keyframe`)."""

    rollouts_per_task: int = Field(default=16, ge=0)
    """Episodes of the warm-started policy for each task: the failed ones are the negatives of the fit."""

    heldout_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each task's start states kept out of the fit; quality is reported on them alone."""

    image_size: int = Field(default=96, ge=32, multiple_of=16)
    """Side in pixels at which the model sees frames; others are resized to it."""

    channels: tuple[int, int, int, int] = (32, 64, 96, 96)
    """Width of the four convolutions; multiples of 8."""

    hidden: int = Field(default=128, ge=8)
    """Width of the layer that reads the feature grid."""

    steps: int = Field(default=600, ge=1)
    """Optimiser steps of the fit."""

    batch_size: int = Field(default=64, ge=2)
    """Frames a step."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate; it warms up over the first tenth of the steps and falls along a cosine."""

    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's decay of weight matrices."""

    shift_pixels: int = Field(default=3, ge=0)
    """Largest random shift of a training frame, in pixels of `image_size`."""

    balance: bool = True
    """Give positive and negative label mass equal weight in the loss; the outputs are corrected back afterwards, so
    that they stay probabilities."""

    log_every: int = Field(default=50, ge=1)
    """Steps between two reports of the training and held-out loss."""

    @model_validator(mode="after")
    def _widths_fit_the_norms(self) -> "RewardModelSection":
        if any(width < 8 or width % 8 for width in self.channels):
            raise ValueError(f"channels must be multiples of 8 (one group norm group each), got {self.channels}")
        return self
