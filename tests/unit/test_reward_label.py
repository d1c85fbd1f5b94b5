"""Progress labels against hand-written answers, and the speed of labelling."""

import time

import numpy as np
import pytest

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.errors import ExtensionError
from reachrl.rewards.process.label import class_weights, keyframe_labels, label_trajectory, progress_labels
from reachrl.rewards.process.segment import Segmentation
from reachrl.types import Start, Trajectory


def milestones(bounds, keyframes=()):
    return Segmentation(bounds=np.array(bounds), keyframes=np.array(keyframes, dtype=np.int64))


def trajectory(ee_state, *, success=True, index=0):
    frames = len(ee_state)
    return Trajectory(
        start=Start("door-open", "train", index),
        instruction="open the door",
        images={"camera": np.zeros((frames, 1, 1, 3), dtype=np.uint8)},
        actions=np.zeros((frames - 1, 4), dtype=np.float32),
        ee_state=np.asarray(ee_state, dtype=np.float32),
        success=success,
        source="expert",
    )


def test_keyframe_labels_cover_the_window_before_each_keyframe():
    labels = keyframe_labels(milestones([0, 9], [1, 6, 9]), window=3)
    assert labels.tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    assert keyframe_labels(milestones([0, 9], [9]), window=1).tolist() == [0] * 9 + [1]


def test_progress_by_time_is_linear():
    labels = progress_labels(milestones([0, 2, 6]), np.zeros((7, 3)), by="time")
    np.testing.assert_allclose(labels, np.arange(7) / 6, atol=1e-7)


def test_progress_by_distance_follows_the_path():
    xyz = np.zeros((7, 3))
    xyz[:, 1] = [0, 3, 4, 4, 3, 3, 1]  # travels 3 + 1 + 0 + 1 + 0 + 2
    labels = progress_labels(milestones([0, 2, 6]), xyz, by="distance")
    np.testing.assert_allclose(labels, np.array([0, 3, 4, 4, 5, 5, 7]) / 7, atol=1e-7)


def test_progress_by_segments_makes_each_worth_the_same():
    labels = progress_labels(milestones([0, 2, 6]), np.zeros((7, 3)), by="segments")
    np.testing.assert_allclose(labels, [0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0], atol=1e-7)


def test_progress_of_a_still_arm_falls_back_to_time():
    labels = progress_labels(milestones([0, 4]), np.ones((5, 3)), by="distance")
    np.testing.assert_allclose(labels, [0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("by", ["time", "distance", "segments"])
def test_progress_rises_from_0_to_1_on_random_motion(by):
    rng = np.random.default_rng(0)
    for _ in range(30):
        frames = int(rng.integers(2, 40))
        ee_state = np.concatenate([rng.normal(size=(frames, 3)).cumsum(0), rng.random((frames, 1))], axis=1)
        labels = label_trajectory(trajectory(ee_state), SmallRewardModelConfig(progress_by=by))
        assert labels.dtype == np.float32
        assert labels[0] == 0 and labels[-1] == 1
        assert (np.diff(labels) >= 0).all()


def test_failures_are_all_zero_and_a_solved_start_is_all_one():
    config = SmallRewardModelConfig()
    assert label_trajectory(trajectory(np.ones((6, 4)), success=False), config).tolist() == [0] * 6
    assert label_trajectory(trajectory(np.ones((1, 4))), config).tolist() == [1]
    keyframe = SmallRewardModelConfig(label="keyframe")
    assert label_trajectory(trajectory(np.ones((6, 4)), success=False), keyframe).tolist() == [0] * 6
    assert label_trajectory(trajectory(np.ones((6, 4))), keyframe).tolist() == [0, 0, 0, 1, 1, 1]


def test_event_labels_are_those_of_the_first_public_code():
    # 40 frames; the gripper closes at frame 10 and opens at frame 30
    ee_state = np.zeros((40, 4))
    ee_state[:, 3] = 1.0
    ee_state[10:30, 3] = 0.0
    ee_state[:, 0] = np.arange(40)
    labels = label_trajectory(trajectory(ee_state), SmallRewardModelConfig(label="events", event_last=4))
    positive = set(range(19, 24)) | set(range(28, 33)) | set(range(36, 40))  # 11 frames late, at once, at the end
    for frame, label in enumerate(labels.tolist()):
        if frame in positive:
            assert label == 1, frame
        elif frame % 5 == 0:
            assert label == 0, frame
        else:
            assert np.isnan(label), frame
    failure = label_trajectory(trajectory(ee_state, success=False), SmallRewardModelConfig(label="events"))
    assert np.flatnonzero(failure == 0).tolist() == list(range(0, 40, 5)) and np.isnan(failure).sum() == 32


def test_a_bad_pose_names_the_trajectory():
    ee_state = np.ones((6, 4))
    ee_state[2, 0] = np.inf
    with pytest.raises(ExtensionError, match="expert trajectory of task 'door-open', train start 17"):
        label_trajectory(trajectory(ee_state, success=False, index=17), SmallRewardModelConfig())


def test_class_weights_give_each_side_half_of_the_loss():
    labels = np.array([1, 0.5, 0, 0, 0, 0, 0, 0], dtype=np.float32)
    positive, negative = class_weights(labels)
    assert positive * labels.sum() == pytest.approx(4.0)
    assert negative * (1 - labels).sum() == pytest.approx(4.0)
    assert class_weights(np.zeros(4, dtype=np.float32)) == (1.0, 1.0)


def test_ten_thousand_steps_are_labelled_in_two_seconds():
    rng = np.random.default_rng(0)
    config = SmallRewardModelConfig(progress_by="distance")
    episodes = [trajectory(np.clip(rng.normal(0.5, 0.3, (21, 4)), 0, 1)) for _ in range(500)]
    began = time.process_time()
    for episode in episodes:
        label_trajectory(episode, config)
    assert time.process_time() - began < 2.0
