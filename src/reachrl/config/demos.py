"""Options of the warm start: demonstrations from scripted experts, and supervised fine-tuning on them."""

from typing import Annotated

from pydantic import Field, model_validator

from reachrl.config.base import LARGEST_RATE, Section
from reachrl.config.marks import Affects
from reachrl.config.perturbations import RandomiseSection


class DemosSection(Section):
    """How demonstrations are collected from the simulator's scripted experts."""

    episodes_per_task: Annotated[int, Affects.DATA] = Field(default=30, ge=1)
    """Successful demonstrations kept per task."""

    action_noise: Annotated[float, Affects.DATA] = Field(default=0.2, ge=0.0)
    """Standard deviation of the Gaussian noise added to what is executed, in units of half the action range.
    The clean expert action is what is recorded, so noise shows the policy how to recover."""

    noise_probability: Annotated[float, Affects.DATA] = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the decisions that are executed with noise."""

    randomise: Annotated[RandomiseSection, Affects.DATA] = RandomiseSection()
    """Perturbed episodes among the demonstrations; see `env.randomise`."""

    max_attempts_factor: Annotated[float, Affects.FUTURE] = Field(default=3.0, ge=1.0)
    """Attempts allowed per demonstration kept; beyond it the task counts as out of its expert's reach."""

    workers: Annotated[int | None, Affects.SPEED] = Field(default=None, ge=1)
    """Processes, one simulator each; unset: one per available core. The data do not depend on it."""


class SFTSection(Section):
    """Supervised fine-tuning on the next-token loss of the action tokens."""

    epochs: Annotated[float, Affects.FUTURE] = Field(default=8.0, ge=0.0)
    """Passes over the training steps (fractions allowed); 0 keeps the policy as it is. Ignored when `steps` is set."""

    steps: Annotated[int | None, Affects.FUTURE] = Field(default=None, ge=1)
    """Optimiser steps; unset: derived from `epochs`."""

    batch_size: Annotated[int, Affects.WARM_START] = Field(default=64, ge=1)
    """Rows (one frame, one action) per optimiser step."""

    micro_batch_size: Annotated[int | None, Affects.SPEED] = Field(default=None, ge=1)
    """Rows per forward pass; unset: the whole batch. Changes memory, not the update."""

    lr: Annotated[float, Affects.FUTURE] = Field(default=5e-4, gt=0.0, le=LARGEST_RATE)
    """Peak learning rate of AdamW."""

    final_lr_fraction: Annotated[float, Affects.FUTURE] = Field(default=0.05, ge=0.0, le=1.0)
    """Learning rate at the end of the cosine, as a fraction of the peak."""

    warmup_steps: Annotated[int, Affects.FUTURE] = Field(default=100, ge=0)
    """Steps of linear warm-up; never more than a tenth of all steps."""

    weight_decay: Annotated[float, Affects.FUTURE] = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices; biases and norms are not decayed."""

    max_grad_norm: Annotated[float, Affects.FUTURE] = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this total norm."""

    shift_pixels: Annotated[int, Affects.FUTURE] = Field(default=4, ge=0)
    """Augmentation: each frame is shifted by up to this many pixels in x and y, edges repeated."""

    brightness: Annotated[float, Affects.FUTURE] = Field(default=0.1, ge=0.0, lt=1.0)
    """Augmentation: up to this fraction of 255 is added to or taken from all channels."""

    contrast: Annotated[float, Affects.FUTURE] = Field(default=0.1, ge=0.0, lt=1.0)
    """Augmentation: the distance from the frame's mean is scaled by a factor in [1 - c, 1 + c]."""

    colour: Annotated[float, Affects.FUTURE] = Field(default=0.05, ge=0.0, lt=1.0)
    """Augmentation: each channel is scaled by its own factor in [1 - c, 1 + c]."""

    heldout_fraction: Annotated[float, Affects.WARM_START] = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of each task's start states whose trajectories are never trained on; 0 keeps the last weights."""

    heldout_rows: Annotated[int, Affects.WARM_START] = Field(default=512, ge=1)
    """At most this many held-out rows, always the same, are scored at each evaluation."""

    eval_every: Annotated[int, Affects.FUTURE] = Field(default=100, ge=1)
    """Steps between held-out evaluations; the best of them is what is kept."""

    checkpoint_every: Annotated[int, Affects.SPEED] = Field(default=200, ge=1)
    """Steps between checkpoints, from which a killed training resumes to the same numbers."""

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> "SFTSection":
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} exceeds batch_size={self.batch_size}; make it smaller."
            )
        return self
