"""Gives every frame of a trajectory a target for P(progress)."""

import numpy as np
from jaxtyping import Float, Float32

from reachrl.config.reward_model import ProgressMeasure, RewardModelSection
from reachrl.rewards.process.segment import Segmentation, segment
from reachrl.types import Trajectory


def keyframe_labels(milestones: Segmentation, *, window: int) -> Float32[np.ndarray, "T+1"]:
    """The paper's labels: 1 for each keyframe and the frames that lead into it, 0 elsewhere.

    Args:
        milestones: segments and keyframes of a successful trajectory.
        window: frames labelled 1 for each keyframe, itself included.
    """
    labels = np.zeros(milestones.bounds[-1] + 1, dtype=np.float32)
    for keyframe in milestones.keyframes.tolist():
        labels[max(0, keyframe - window + 1) : keyframe + 1] = 1.0
    return labels


def progress_labels(
    milestones: Segmentation, xyz: Float[np.ndarray, "T+1 3"], *, by: ProgressMeasure
) -> Float32[np.ndarray, "T+1"]:
    """The share of the task that lies behind each frame, from 0 at the first frame to 1 at the last; it never falls.

    `time` and `distance` measure the whole trajectory; `segments` makes each segment worth the same, with time
    inside it. A gripper that merely settles after the reset is a segment too, and half of the task by the last
    measure: it suits tasks whose gripper changes are all part of the work.

    Args:
        milestones: segments and keyframes of a successful trajectory.
        xyz: end-effector position of every frame in metres.
        by: what measures progress; `distance` means time where the arm never moved.
    """
    bounds = milestones.bounds
    if bounds[-1] == 0:
        return np.ones(1, dtype=np.float32)  # the first frame already shows the goal
    worth = np.ones(bounds[-1])  # [T] of each decision
    if by == "distance":
        travelled = np.linalg.norm(np.diff(xyz.astype(np.float64), axis=0), axis=1)
        worth = travelled if travelled.sum() > 1e-9 else worth
    elif by == "segments":
        lengths = np.diff(bounds)
        worth = np.repeat(1.0 / lengths, lengths)
    behind = np.concatenate([[0.0], np.cumsum(worth)])
    return (behind / behind[-1]).astype(np.float32)


def event_labels(
    milestones: Segmentation, opening: Float[np.ndarray, "T+1"], *, delay: int, window: int, last: int, stride: int
) -> Float32[np.ndarray, "T+1"]:
    """The first public code's labels: 1 around gripper events and at the end, 0 every few frames, NaN elsewhere.

    A window follows a closing by `delay` frames, which stands in for the motion having settled, and an opening
    at once. Frames in no window, not among the last ones and not at the stride take no part in the fit.

    Args:
        milestones: segments of a successful trajectory.
        opening: gripper opening 0..1 of every frame.
        delay: frames from a closing to the middle of its window.
        window: frames on both sides of the middle.
        last: frames at the end that are positive.
        stride: every how many frames a negative is kept.

    Source: the label script of the first public VLA-RL code (April 2025); arXiv 2505.18719 does not describe it.
    """
    labels = np.full(milestones.bounds[-1] + 1, np.nan, dtype=np.float32)
    labels[::stride] = 0.0
    labels[max(0, len(labels) - last) :] = 1.0
    for before, cut, after in zip(milestones.bounds, milestones.bounds[1:-1], milestones.bounds[2:], strict=False):
        closing = opening[cut : after + 1].mean() < opening[before:cut].mean()
        middle = int(cut) + (delay if closing else 0)
        labels[max(0, middle - window) : middle + window + 1] = 1.0
    return labels


def segment_trajectory(trajectory: Trajectory, config: RewardModelSection) -> Segmentation:
    """Cut one trajectory with the configured thresholds.

    Raises:
        ExtensionError: a pose is not finite; names the trajectory.
    """
    start = trajectory.start
    return segment(
        trajectory.ee_state,
        success=trajectory.success,
        gripper_change=config.gripper_change,
        min_segment=config.min_segment,
        keyframe_speed=config.keyframe_speed,
        name=f"{trajectory.source} trajectory of task '{start.task}', {start.split} start {start.index}",
    )


def label_trajectory(trajectory: Trajectory, config: RewardModelSection) -> Float32[np.ndarray, "T+1"]:
    """Targets of one trajectory's frames; NaN where a frame takes no part in the fit.

    Every labelled frame of a failed trajectory is 0, whatever it resembles: a frame that successes and failures
    share then settles at its progress times the odds that it led to success. A state from which the policy
    habitually fails therefore earns little however far along it looks, and loitering in it does not pay.

    Args:
        trajectory: one success or failure.
        config: which labels, and the thresholds of the segmentation.

    Raises:
        ExtensionError: a pose is not finite; names the trajectory.
    """
    milestones = segment_trajectory(trajectory, config)
    if not trajectory.success:
        failure = np.zeros(len(trajectory.ee_state), dtype=np.float32)
        if config.label == "events":
            failure[np.arange(len(failure)) % config.event_stride != 0] = np.nan
        return failure
    if config.label == "keyframe":
        return keyframe_labels(milestones, window=config.keyframe_window)
    if config.label == "events":
        return event_labels(
            milestones,
            trajectory.ee_state[:, 3],
            delay=config.event_delay,
            window=config.event_window,
            last=config.event_last,
            stride=config.event_stride,
        )
    return progress_labels(milestones, trajectory.ee_state[:, :3], by=config.progress_by)


def class_weights(labels: Float[np.ndarray, "B"]) -> tuple[float, float]:
    """Loss weights that give positive and negative label mass half of the loss each.

    A soft label `y` counts as `y` of a positive and `1 - y` of a negative. Weighting shifts the fitted
    logit by `log(positive / negative)`; subtracting that restores a probability under the data.

    Args:
        labels: all training labels in [0, 1].

    Returns:
        (positive, negative) weights; (1, 1) where one of the masses is absent.
    """
    positive, negative = float(labels.sum()), float((1.0 - labels).sum())
    if positive <= 0 or negative <= 0:
        return 1.0, 1.0
    return 0.5 * len(labels) / positive, 0.5 * len(labels) / negative
