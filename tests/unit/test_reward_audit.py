"""The hacking alarm: silent while score and success go together, heard when they part, the same after a resume."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from reachrl.config.audit import AuditSection
from reachrl.report.video import read_video
from reachrl.rewards.audit import RewardAudit, correlation
from reachrl.testing.rewards import one_camera
from reachrl.types import Episode, Observation, Rewards, Rollout, Start

CONFIG = AuditSection(window=20, min_episodes=5, num_videos=2)
LENGTH = 4


def rollout_of(outcomes, scores, *, lost=()):
    """One environment, episodes of four decisions with given outcomes; every decision of an episode scores the same."""
    steps = LENGTH * len(outcomes)
    rng = np.random.default_rng(steps)
    ended = np.zeros((steps, 1), bool)
    ended[LENGTH - 1 :: LENGTH] = True
    success = np.zeros((steps, 1), bool)
    success[LENGTH - 1 :: LENGTH, 0] = outcomes
    rows = np.argwhere(ended)
    valid = np.ones((steps, 1), bool)
    valid[list(lost)] = False
    frames = rng.integers(0, 255, (steps, 1, 24, 24, 3), dtype=np.uint8)
    rollout = Rollout(
        images={"camera": frames},
        instructions=(("reach the goal",),) * steps,
        last_observation=Observation(images={"camera": frames[0]}, instructions=("reach the goal",)),
        final_observation=one_camera(frames[: len(rows), 0]),
        final_rows=rows,
        token_ids=np.zeros((steps, 1, 4), np.int64),
        token_mask=np.ones((steps, 1, 4), bool),
        behaviour_logprobs=np.zeros((steps, 1, 4), np.float32),
        malformed=np.zeros((steps, 1), bool),
        success=success,
        terminated=ended & success,
        truncated=ended & ~success,
        valid=valid,
        executed=valid.astype(np.int32),
        ee_state=np.zeros((steps, 1, 4), np.float32),
        progress=np.zeros((steps, 1, 2), np.float32),
        episodes=tuple(
            Episode(
                start=Start("reach", "train", i), success=bool(outcome), num_steps=LENGTH, num_decisions=LENGTH, env=0
            )
            for i, outcome in enumerate(outcomes)
        ),
        policy_version=0,
    )
    progress = np.repeat(np.array(scores, np.float32), LENGTH)[:, None]
    total = success.astype(np.float32)
    return rollout, Rewards(total=total, parts={"task": total}, progress=progress)


HALF = [True, False] * 5
GOOD = rollout_of(HALF, [0.8, 0.2] * 5)
HACKED = rollout_of(HALF, [0.5, 0.9] * 5)


def test_a_reward_that_goes_with_success_is_left_alone(tmp_path, caplog):
    audit = RewardAudit(CONFIG, tmp_path)
    with caplog.at_level(logging.WARNING):
        for iteration in range(4):
            figures = audit.observe(*GOOD, iteration=iteration)
    assert figures["audit/score_correlation"] == pytest.approx(1.0)
    assert figures["audit/failure_score"] == pytest.approx(0.2)
    assert figures["audit/success_score"] == pytest.approx(0.8)
    assert figures["audit/failure_drift"] == pytest.approx(0.0) and figures["audit/alarm"] == 0
    assert caplog.records == [] and list(tmp_path.iterdir()) == []


def test_a_hacked_reward_is_reported_once_with_films_of_what_it_liked(tmp_path, caplog):
    audit = RewardAudit(CONFIG, tmp_path)
    audit.observe(*GOOD, iteration=0)
    with caplog.at_level(logging.WARNING):
        figures = [audit.observe(*HACKED, iteration=iteration) for iteration in (1, 2, 3)]
    audit.finish()  # films are made beside training
    assert [each["audit/alarm"] for each in figures] == [1, 1, 1]
    assert len(caplog.records) == 1
    text = caplog.text
    assert "iteration 1" in text and "audit.drift=0.2" in text and "reward.mode=potential" in text
    films = sorted(tmp_path.iterdir())
    assert [film.name for film in films] == ["alarm_iteration0001_1.mp4", "alarm_iteration0001_2.mp4"]
    assert all(str(film) in text and len(read_video(film)) >= LENGTH + 1 for film in films)
    assert figures[-1]["audit/score_correlation"] == pytest.approx(-1.0)
    quiet = [audit.observe(*GOOD, iteration=iteration)["audit/alarm"] for iteration in range(4, 8)]
    assert quiet[-1] == 0  # the window has moved on


def test_failures_that_linger_near_the_goal_are_no_sign_of_a_fooled_model(tmp_path, caplog):
    """A success is mostly approach, a failure mostly waiting: the mean scores say the opposite of the last frames."""
    rollout, rewards = GOOD
    approach, waiting = [0.0, 0.1, 0.2, 0.9], [0.2, 0.5, 0.5, 0.5]
    progress = np.array([score for success in HALF for score in (approach if success else waiting)], np.float32)
    audit = RewardAudit(CONFIG, tmp_path)
    with caplog.at_level(logging.WARNING):
        figures = audit.observe(rollout, replace(rewards, progress=progress[:, None]), iteration=0)
    assert figures["audit/success_score"] == pytest.approx(0.3) and figures["audit/failure_score"] > 0.42
    assert figures["audit/score_correlation"] == pytest.approx(1.0)  # 0.9 in each success, 0.5 in each failure
    assert figures["audit/alarm"] == 0 and caplog.records == []


def test_episodes_noted_without_their_last_score_are_left_out(tmp_path):
    audit = RewardAudit(CONFIG, tmp_path)
    audit.observe(*GOOD, iteration=0)
    state = audit.state_dict()
    for episode in state["recent"][:4]:
        del episode["last"]
    audit.load_state_dict(state)
    assert len(audit.state_dict()["recent"]) == 6


def test_of_many_warnings_the_latest_films_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("reachrl.rewards.audit._KEPT_FILMS", 4)
    audit = RewardAudit(CONFIG, tmp_path)
    (tmp_path / "after_reach.mp4").touch()
    audit.observe(*GOOD, iteration=0)
    for warning in range(1, 5):
        audit.observe(*HACKED, iteration=10 * warning)
        audit.finish()
        for quiet in range(4):
            audit.observe(*GOOD, iteration=10 * warning + 1 + quiet)
    found = sorted(film.name for film in tmp_path.iterdir())
    assert found == ["after_reach.mp4", *(f"alarm_iteration00{when}_{n}.mp4" for when in (30, 40) for n in (1, 2))]


def test_the_correlation_alone_raises_the_alarm(tmp_path, caplog):
    audit = RewardAudit(CONFIG, tmp_path)
    with caplog.at_level(logging.WARNING):
        audit.observe(*rollout_of(HALF, [0.2, 0.3] * 5), iteration=0)
    text = caplog.text
    assert "its last frame's progress score correlates with success by -1.00" in text
    assert "earns" not in text and "more than the run's first" not in text


def test_failures_that_earn_more_than_successes_raise_the_alarm_though_the_model_is_right(tmp_path, caplog):
    rollout, rewards = GOOD
    total = rewards.total.copy()
    total[~rollout.success[:, 0]] = 0.5  # paid for every decision that does not end the episode
    audit = RewardAudit(CONFIG, tmp_path)
    longer = np.where(np.repeat(HALF, LENGTH)[:, None], total, 2 * total)  # failures earn it twice
    with caplog.at_level(logging.WARNING):
        figures = audit.observe(
            rollout, Rewards(total=longer, parts={"task": longer}, progress=rewards.progress), iteration=0
        )
    assert figures["audit/score_correlation"] == pytest.approx(1.0)
    assert figures["audit/return_correlation"] == pytest.approx(-1.0)
    assert "what an episode earns correlates with success by -1.00" in caplog.text


def test_nothing_is_said_of_too_few_episodes(tmp_path, caplog):
    audit = RewardAudit(CONFIG, tmp_path)
    with caplog.at_level(logging.WARNING):
        figures = audit.observe(*rollout_of([True, False] * 4, [0.1, 0.9] * 4), iteration=0)
    assert figures["audit/score_correlation"] is None and figures["audit/alarm"] == 0 and caplog.records == []


def test_a_reward_without_progress_scores_is_not_watched(tmp_path):
    rollout, rewards = GOOD
    assert RewardAudit(CONFIG, tmp_path).observe(rollout, Rewards(total=rewards.total), iteration=0) == {}


def test_episodes_across_rollouts_count_once_and_lost_ones_not_at_all(tmp_path):
    rollout, rewards = rollout_of([False] * 3, [0.1, 0.4, 0.7])
    audit = RewardAudit(CONFIG, tmp_path)
    parts = [(0, 6), (6, 12)]  # the second episode is cut in two
    for first, last in parts:
        cut = slice(first, last)
        per_step = ["token_ids", "token_mask", "behaviour_logprobs", "malformed", "ee_state", "progress"]
        per_step += ["success", "terminated", "truncated", "valid", "executed"]
        inside = [i for i, (t, _) in enumerate(rollout.final_rows) if first <= t < last]
        part = replace(
            rollout,
            **{name: getattr(rollout, name)[cut] for name in per_step},
            images={"camera": rollout.frames[cut]},
            instructions=rollout.instructions[cut],
            final_rows=rollout.final_rows[inside] - [first, 0],
            final_observation=rollout.final_observation.rows(np.array(inside, np.int64)),
            episodes=tuple(rollout.episodes[i] for i in inside),
        )
        assert rewards.progress is not None
        total = rewards.total[cut]
        audit.observe(part, Rewards(total=total, parts={"task": total}, progress=rewards.progress[cut]), iteration=0)
    scores = [episode["score"] for episode in audit.state_dict()["recent"]]
    assert scores == pytest.approx([0.1, 0.4, 0.7])
    other = RewardAudit(CONFIG, tmp_path)
    other.observe(*rollout_of([False] * 3, [0.1, 0.4, 0.7], lost=[5]), iteration=0)
    assert len(other.state_dict()["recent"]) == 3  # what came after the lost step is an episode of its own
    assert other.state_dict()["recent"][1]["score"] == pytest.approx(0.4)


def test_a_resumed_audit_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, first = RewardAudit(CONFIG, tmp_path), RewardAudit(CONFIG, tmp_path)
    for audit in (whole, first):
        audit.observe(*GOOD, iteration=0)
        audit.observe(*HACKED, iteration=1)
    resumed = RewardAudit(CONFIG, tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for iteration in (2, 3):
        assert resumed.observe(*GOOD, iteration=iteration) == whole.observe(*GOOD, iteration=iteration)
    assert resumed.state_dict() == whole.state_dict()


def test_correlation_is_the_point_biserial_one():
    rng = np.random.default_rng(0)
    x, y = rng.random(50), rng.random(50) < 0.4
    expected = (x[y].mean() - x[~y].mean()) / x.std() * np.sqrt(y.mean() * (1 - y.mean()))
    assert correlation(x, y) == pytest.approx(expected)
    assert correlation(x[:1], y[:1]) is None and correlation(np.ones(5), y[:5]) is None
