"""Options of the process reward model: its labels, its fit, and the kinds of model there are."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from reachrl.config.base import LARGEST_RATE, Section
from reachrl.config.marks import Affects

ProgressMeasure = Literal["time", "distance", "segments"]
LabelKind = Literal["progress", "keyframe", "events"]


class RewardModelSection(Section):
    """How trajectories are labelled and how any reward model is fitted to the labels."""

    kind: Annotated[str, Affects.REWARD_MODEL]
    """Which model: a built-in name or `package.module:Class`."""

    label: Annotated[LabelKind, Affects.REWARD_MODEL] = "progress"
    """`progress`: how much of a successful trajectory is behind a frame, 0 in failed ones. `keyframe`: the
    paper's 1 for frames that lead into a keyframe and 0 elsewhere. `events`: the first public code's 1 for the last
    frames and for windows around gripper changes, and 0 for every few frames between them."""

    progress_by: Annotated[ProgressMeasure, Affects.REWARD_MODEL] = "time"
    """What progress is the share of: the trajectory's decisions (`time`), the way its end effector travelled
    (`distance`), or its gripper segments, each worth the same (`segments`)."""

    gripper_change: Annotated[float, Affects.REWARD_MODEL] = Field(default=0.15, gt=0, le=1)
    """Smallest change of gripper opening (0 closed .. 1 open) within a trajectory that cuts it into segments."""

    min_segment: Annotated[int, Affects.REWARD_MODEL] = Field(default=3, ge=1)
    """Frames a new gripper state must last to count; shorter flips are chatter."""

    keyframe_speed: Annotated[float, Affects.REWARD_MODEL] = Field(default=0.15, gt=0, lt=1)
    """End-effector speed, as a fraction of the trajectory's fast motion, below which it has come to rest."""

    keyframe_window: Annotated[int, Affects.REWARD_MODEL] = Field(default=3, ge=1)
    """Frames labelled positive for each keyframe: the keyframe and those just before it (label `keyframe`)."""

    event_delay: Annotated[int, Affects.REWARD_MODEL] = Field(default=11, ge=0)
    """Frames from the gripper's closing to the middle of its window; opening has none (label `events`)."""

    event_window: Annotated[int, Affects.REWARD_MODEL] = Field(default=2, ge=0)
    """Frames on both sides of an event's middle that are positive (label `events`)."""

    event_last: Annotated[int, Affects.REWARD_MODEL] = Field(default=10, ge=1)
    """Frames at the end of a success that are positive (label `events`)."""

    event_stride: Annotated[int, Affects.REWARD_MODEL] = Field(default=5, ge=1)
    """Every how many frames the rest of a trajectory gives a negative; the others are left out (label `events`)."""

    num_frames: Annotated[int, Affects.REWARD_MODEL] = Field(default=1, ge=1)
    """Frames of the same episode that the model sees at once, the newest last."""

    frame_stride: Annotated[int, Affects.REWARD_MODEL] = Field(default=1, ge=1)
    """Decisions between two of them; before an episode's first frame, that frame is repeated."""

    shuffled_negatives: Annotated[float, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = Field(
        default=0.0, ge=0, lt=1
    )
    """Share of the frames of each batch that are replaced by negatives: frames of a success in an order that is not
    theirs. It takes `num_frames` above 1: one frame has no order."""

    trajectories: Annotated[tuple[Path, ...], Affects.REWARD_MODEL] = ()
    """Further trajectories to fit to, beside demonstrations and the policy's episodes: stores, LIBERO's .hdf5 files,
    LeRobot datasets; see the reference on demonstrations."""

    rollouts_per_task: Annotated[int, Affects.REWARD_MODEL] = Field(default=16, ge=0)
    """Episodes of the warm-started policy for each task: the failed ones are the negatives of the fit."""

    heldout_fraction: Annotated[float, Affects.REWARD_MODEL] = Field(default=0.2, gt=0, lt=1)
    """Share of each task's start states kept out of the fit; quality is reported on them alone."""

    steps: Annotated[int, Affects.REWARD_MODEL] = Field(default=600, ge=1)
    """Optimiser steps of the fit."""

    batch_size: Annotated[int, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = Field(default=64, ge=2)
    """Frames a step."""

    lr: Annotated[float, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = Field(
        default=1e-3, gt=0, le=LARGEST_RATE
    )
    """Peak learning rate; it warms up over the first tenth of the steps and falls along a cosine."""

    weight_decay: Annotated[float, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = Field(default=0.05, ge=0)
    """AdamW's decay of weight matrices."""

    shift_pixels: Annotated[int, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = Field(default=3, ge=0)
    """Largest random shift of a training frame, in pixels of the stored frame."""

    balance: Annotated[bool, Affects.REWARD_MODEL | Affects.TRAINING | Affects.FUTURE] = True
    """Give positive and negative label mass equal weight in the loss; the outputs are corrected back afterwards, so
    that they stay probabilities."""

    log_every: Annotated[int, Affects.SPEED] = Field(default=50, ge=1)
    """Steps between two reports of the training and held-out loss."""

    refit_every: Annotated[int, Affects.TRAINING | Affects.FUTURE] = Field(default=0, ge=0)
    """RL iterations between two refits on fresh episodes; 0: the model stays as it was fitted before RL. Each refit
    is a new version of the model beside the earlier ones."""

    refit_steps: Annotated[int, Affects.TRAINING | Affects.FUTURE] = Field(default=100, ge=1)
    """Optimiser steps of a refit; it starts from the weights in use."""

    refit_window: Annotated[int, Affects.TRAINING | Affects.FUTURE] = Field(default=5, ge=1)
    """Iterations whose episodes a refit adds to the data of the first fit."""

    @model_validator(mode="after")
    def _order_needs_frames(self) -> "RewardModelSection":
        if self.shuffled_negatives > 0 and self.num_frames == 1:
            raise ValueError("shuffled_negatives needs num_frames of at least 2: one frame has no order")
        return self


class SmallRewardModelConfig(RewardModelSection):
    """A convolutional network of some hundred thousand weights that reads the instruction as a bag of words."""

    kind: Literal["small"] = "small"  # pyright: ignore[reportIncompatibleVariableOverride]

    image_size: Annotated[int, Affects.REWARD_MODEL] = Field(default=96, ge=32, multiple_of=16)
    """Side in pixels at which the model sees frames; others are resized to it."""

    channels: Annotated[tuple[int, int, int, int], Affects.REWARD_MODEL] = (32, 64, 96, 96)
    """Width of the four convolutions; multiples of 8."""

    hidden: Annotated[int, Affects.REWARD_MODEL] = Field(default=128, ge=8)
    """Width of the layer that reads the feature grid."""

    @model_validator(mode="after")
    def _widths_fit_the_norms(self) -> "SmallRewardModelConfig":
        if any(width < 8 or width % 8 for width in self.channels):
            raise ValueError(f"channels must be multiples of 8 (one group norm group each), got {self.channels}")
        return self


class VLMRewardModelConfig(RewardModelSection):
    """A vision-language model that is asked whether the task is done and answers `1` or `0`; LoRA trains it."""

    kind: Literal["vlm"] = "vlm"  # pyright: ignore[reportIncompatibleVariableOverride]

    checkpoint: Annotated[Path | None, Affects.REWARD_MODEL] = None
    """Folder of a Qwen2-VL, Qwen2.5-VL or SmolVLM checkpoint in the Hugging Face layout."""

    prompt: Annotated[str, Affects.REWARD_MODEL] = "The task is {instruction}, is it completed?"
    """What is asked beside the frame (the paper's words)."""

    answers: Annotated[tuple[str, str], Affects.REWARD_MODEL] = ("1", "0")
    """The answer that means yes and the one that means no; each must be a single token."""

    image_size: Annotated[int, Affects.REWARD_MODEL] = Field(default=224, ge=28)
    """Side in pixels to which a Qwen model's frames are resized, rounded to whole tokens (28 pixels each). SmolVLM
    sees frames at the one size its vision tower has, whatever this says."""

    lora_rank: Annotated[int, Affects.REWARD_MODEL] = Field(default=16, ge=0)
    """Rank of the adapters on the language model's linear maps; 0 trains all of the language model's weights."""

    lora_alpha: Annotated[float, Affects.REWARD_MODEL] = Field(default=32.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""

    lr: float = Field(default=1e-4, gt=0, le=LARGEST_RATE)
    """Peak learning rate; it warms up over the first tenth of the steps and falls along a cosine."""

    batch_size: int = Field(default=8, ge=2)
    """Frames a step."""

    steps: int = Field(default=1000, ge=1)
    """Optimiser steps of the fit."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of weight matrices."""


class TransformersRewardModelConfig(RewardModelSection):
    """Any `transformers` model with a score or class logits over (frame, text); used as it is unless `steps` is set."""

    kind: Literal["transformers"] = "transformers"  # pyright: ignore[reportIncompatibleVariableOverride]

    checkpoint: Annotated[Path | None, Affects.REWARD_MODEL] = None
    """Folder of the checkpoint in the Hugging Face layout."""

    model_class: Annotated[str, Affects.REWARD_MODEL] = "transformers:AutoModelForImageClassification"
    """Import string of the class whose `from_pretrained` reads the folder."""

    processor_class: Annotated[str, Affects.REWARD_MODEL] = "transformers:AutoProcessor"
    """Import string of the class that turns frames and text into the model's inputs."""

    prompt: Annotated[str, Affects.REWARD_MODEL] = "{instruction}"
    """The text that goes with the frame; empty: the model takes frames only."""

    steps: int = Field(default=0, ge=0)
    """Optimiser steps of a fit of all its weights; 0: it is used as it is."""

    lr: float = Field(default=1e-5, gt=0, le=LARGEST_RATE)
    """Peak learning rate; it warms up over the first tenth of the steps and falls along a cosine."""

    positive: Annotated[int, Affects.REWARD_MODEL] = Field(default=0, ge=0)
    """Which of the output's logits means progress; a single logit is passed through a sigmoid."""
