"""Segments and keyframes against motions whose answer is known by construction."""

import numpy as np
import pytest

from reachrl.errors import ExtensionError
from reachrl.rewards.process.segment import gripper_cuts, rest_frames, segment

OPTIONS = {"gripper_change": 0.15, "min_segment": 3, "keyframe_speed": 0.15}


def cuts(opening, **overrides):
    options = {"gripper_change": 0.15, "min_segment": 3} | overrides
    return gripper_cuts(np.asarray(opening, dtype=np.float64), **options).tolist()


def along_x(speeds):
    """Positions f64[T+1 3] of an arm that moves along x with the given speeds in metres a decision."""
    xyz = np.zeros((len(speeds) + 1, 3))
    xyz[1:, 0] = np.cumsum(speeds)
    return xyz


def rests(xyz):
    return rest_frames(xyz, np.array([0, len(xyz) - 1]), keyframe_speed=0.15).tolist()


def state(speeds, opening):
    return np.concatenate([along_x(speeds), np.asarray(opening, dtype=np.float64)[:, None]], axis=1)


def test_constant_gripper_is_one_segment():
    assert cuts(np.full(20, 0.7)) == []
    assert cuts(0.7 + 0.05 * np.sin(np.arange(50))) == []  # range 0.1, below the threshold


def test_cut_is_the_first_frame_of_the_new_state():
    assert cuts([1] * 6 + [0.4] * 7) == [6]
    assert cuts([1] * 5 + [0] * 5 + [1] * 5) == [5, 10]
    assert cuts([1, 1, 1, 1, 0.7, 0.45, 0.2, 0, 0, 0]) == [6]  # a slow closing is one cut, at the lower threshold


def test_noise_around_one_level_does_not_cut():
    rng = np.random.default_rng(0)
    opening = np.concatenate([np.full(15, 0.9), np.full(15, 0.3)]) + rng.uniform(-0.05, 0.05, 30)
    assert cuts(opening) == [15]


@pytest.mark.parametrize("level", [0.45, 0.5, 0.55])
def test_hovering_between_the_thresholds_keeps_the_state(level):
    assert cuts([1] * 6 + [level] * 6 + [1] * 6 + [0] * 6) == [18]


def test_chatter_is_absorbed():
    chatter = [0, 1] * 4
    assert cuts([1] * 6 + chatter + [1] * 6) == []
    assert cuts([1] * 6 + chatter + [0] * 6) == [14]
    assert cuts([1] * 6 + chatter + [0] + [0] * 6) == [14]
    assert cuts([0, 1] * 20) == []  # nothing but chatter
    assert cuts([0] + [1] * 10) == []  # a first state of one frame is too short to be a segment
    assert cuts([1] * 10 + [0, 0]) == []  # and so is a last one of two
    assert cuts([1] * 10 + [0, 0], min_segment=2) == [10]


def test_flipping_open_and_closed_gives_the_same_cuts():
    rng = np.random.default_rng(3)
    for _ in range(50):
        levels = np.repeat(rng.integers(0, 2, 12), rng.integers(1, 6, 12)).astype(float)
        levels[rng.integers(len(levels))] = 0.3
        assert cuts(levels) == cuts(1.0 - levels)


def test_rest_frames_are_where_the_arm_stops():
    # 4 fast moves, rest over motions 4..6 with the slowest 5, 4 fast moves, a stop at the end
    speeds = [0.1] * 4 + [0.01, 0.0, 0.008] + [0.1] * 4 + [0.002]
    assert rests(along_x(speeds)) == [6, 12]


def test_rest_before_the_first_motion_is_no_keyframe():
    assert rests(along_x([0.0, 0.0] + [0.1] * 5)) == []


def test_keyframes_do_not_depend_on_units_or_single_jumps():
    speeds = np.array([0.1] * 12 + [0.003] + [0.09] * 12)
    for scale in (1e-3, 1.0, 1e3):
        assert rests(along_x(speeds * scale)) == [13]
    speeds[3] = 50.0  # one glitch must not make all other motion look slow
    assert rests(along_x(speeds)) == [13]


def test_arm_that_never_moves_has_no_rest_frame():
    assert rests(np.full((9, 3), 0.3)) == []


def test_end_of_success_is_a_keyframe_and_end_of_failure_is_not():
    ee_state = state([0.1] * 8, [1] * 9)
    assert segment(ee_state, success=True, **OPTIONS).keyframes.tolist() == [8]
    assert segment(ee_state, success=False, **OPTIONS).keyframes.tolist() == []
    assert segment(ee_state, success=True, **OPTIONS).bounds.tolist() == [0, 8]


def test_pick_and_place():
    speeds = [0.1] * 5 + [0.0] * 3 + [0.1] * 5 + [0.0] * 3
    opening = [1] * 7 + [0.5] * 10
    milestones = segment(state(speeds, opening), success=True, **OPTIONS)
    assert milestones.bounds.tolist() == [0, 7, 16]
    assert milestones.keyframes.tolist() == [6, 14, 16]


def test_the_rest_that_opens_a_segment_belongs_to_the_one_before():
    xyz = along_x([0.1] * 5 + [0.004, 0.003, 0.002, 0.001] + [0.1] * 5)
    assert rests(xyz) == [9]
    cut_in_the_rest = rest_frames(xyz, np.array([0, 7, 14]), keyframe_speed=0.15)
    assert cut_in_the_rest.tolist() == [7]  # the slowest frame before the cut; motion resumes from the rest after it


def test_short_episodes():
    one = segment(np.ones((1, 4)), success=True, **OPTIONS)
    assert (one.bounds.tolist(), one.keyframes.tolist()) == ([0, 0], [0])
    two = segment(state([0.1], [1, 0]), success=True, **OPTIONS)
    assert (two.bounds.tolist(), two.keyframes.tolist()) == ([0, 1], [1])


def test_bad_poses_name_the_trajectory_and_the_frame():
    ee_state = state([0.1] * 8, [1] * 9)
    ee_state[4, 1] = np.nan
    with pytest.raises(ExtensionError, match=r"door-open start 3.*frame 4 \(1 of 9"):
        segment(ee_state, success=True, name="door-open start 3", **OPTIONS)
    with pytest.raises(ExtensionError, match="expected"):
        segment(np.ones((5, 3)), success=True, **OPTIONS)


# --- measurements as they come ----------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.04, 0.06])
def test_a_gripper_measured_in_noise_is_cut_at_its_steps_only(sigma):
    for seed in range(20):
        noise = sigma * np.random.default_rng(seed).standard_normal(200)
        assert cuts(0.5 + noise) == []  # ranges over up to 0.4, more than twice `gripper_change`
        found = cuts(np.repeat([0.9, 0.3, 0.9], [80, 70, 50]) + noise)
        assert np.abs(np.array(found) - [80, 150]).max() <= 2


def test_a_slow_drift_is_no_change_and_a_slow_closing_is():
    assert cuts(np.linspace(1.0, 0.75, 200)) == []  # ranges over 0.25, but its halves are 0.125 apart
    assert cuts(np.linspace(1.0, 0.0, 200)) == [120]
    drifting = np.repeat([0.9, 0.3], 100) + np.linspace(0.0, 0.1, 200)
    assert cuts(drifting) == [100]


def test_small_steps_are_dropped_one_by_one():
    staircase = np.repeat([1.0, 0.55, 0.45, 0.55, 0.0], 10)
    assert cuts(staircase) == [40]
    assert cuts(np.repeat([1.0, 0.5, 1.0], [10, 3, 10])) == [10, 13]


def test_an_outlier_of_the_gripper_hides_nothing_smaller_than_itself_but_cuts_nothing():
    opening = np.full(60, 0.8)
    opening[30] = 0.0
    assert cuts(opening) == []


def test_a_chattering_gripper_in_a_grasp_leaves_the_grasp():
    rng = np.random.default_rng(1)
    chatter = rng.integers(0, 2, 12).astype(float)
    opening = np.concatenate([np.ones(20), chatter, np.zeros(20), 1 - chatter, np.ones(20)])
    found = cuts(opening, min_segment=5)
    assert len(found) == 2 and 20 <= found[0] <= 32 and 52 <= found[1] <= 64


def test_poses_that_arrive_more_rarely_than_frames_are_no_rests():
    moving = along_x([0.1] * 30)
    every_second = np.repeat(moving, 2, axis=0)[:39]
    assert rests(every_second) == []
    one_missed = moving.copy()
    one_missed[12] = one_missed[11]
    assert rests(one_missed) == []
    stopped = along_x([0.1] * 10 + [0.0] * 2 + [0.1] * 10)  # two frames still: the arm did rest
    assert rests(stopped) == [11]
    slowing = along_x([0.1] * 10 + [0.01, 0.0, 0.01] + [0.1] * 10)
    assert rests(slowing) == [12]


def test_bridging_does_not_change_the_caller_s_poses():
    xyz = np.repeat(along_x([0.1] * 10), 2, axis=0)
    before = xyz.copy()
    rests(xyz)
    assert (xyz == before).all()


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("min_segment", [1, 3])
def test_one_to_three_frames(frames, min_segment):
    options = OPTIONS | {"min_segment": min_segment}
    for opening in ([1, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0]):
        for speeds in ([0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [0.1, 0.1]):
            ee_state = state(speeds, opening)[:frames]
            for success in (True, False):
                found = segment(ee_state, success=success, **options)
                assert found.bounds[0] == 0 and found.bounds[-1] == frames - 1
                assert frames == 1 or (np.diff(found.bounds) > 0).all()  # every segment has a decision
                assert set(found.keyframes.tolist()) <= set(range(frames))
                assert success == (frames - 1 in found.keyframes) or speeds[frames - 2] == 0.0


def test_a_change_in_the_last_frame_opens_no_empty_segment():
    ee_state = state([0.1] * 5, [1, 1, 1, 1, 1, 0])
    assert segment(ee_state, success=True, **OPTIONS | {"min_segment": 1}).bounds.tolist() == [0, 5]


def test_an_empty_trajectory_is_refused():
    with pytest.raises(ExtensionError, match="at least one frame"):
        segment(np.ones((0, 4)), success=True, **OPTIONS)
