"""The process reward against an episode-by-episode brute force, for both modes and every kind of ending."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from reachrl.config.reward import ProcessRewardConfig
from reachrl.errors import ConfigError, ExtensionError
from reachrl.rewards.episodes import frame_numbers
from reachrl.rewards.process.reward import ProcessReward
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.rewards.task import TaskReward
from reachrl.testing.rewards import check_reward, make_rollout

GAMMA = 0.9


class PixelModel(SmallRewardModel):
    """Scores a frame by its first pixel, and remembers what it was asked."""

    def __init__(self):
        super().__init__(image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=["reach the goal"])
        self.seen: list[tuple[float, str]] = []

    def score(self, images, instructions, *, batch_size=128):
        scores = pixel_scores(images)
        self.seen += list(zip(scores.tolist(), instructions, strict=True))
        return scores


def pixel_scores(images):
    """One distinct number in [0, 1] for each of a test's frames."""
    first = images.reshape(len(images), -1)[:, :3].astype(np.float32)
    return (first @ np.array([65536, 256, 1], dtype=np.float32) / 2**24).astype(np.float32)


def rollout_with_all_endings(seed=0):
    rollout = make_rollout(9, 4, seed=seed)
    assert rollout.terminated.any() and rollout.truncated.any() and not rollout.valid.all()
    return rollout


def frames_by_hand(rollout, t, n):
    """(frame seen before the action, frame the action led to), written as the types describe them."""
    for row, (end_t, end_n) in enumerate(rollout.final_rows):
        if (end_t, end_n) == (t, n):
            return rollout.frames[t, n], rollout.final_frames[row]
    if t + 1 < len(rollout.frames):
        return rollout.frames[t, n], rollout.frames[t + 1, n]
    return rollout.frames[t, n], rollout.last_observation.frames[n]


@pytest.mark.parametrize("mode", ["sum", "potential"])
def test_every_step_against_brute_force(mode):
    for seed in range(5):
        rollout = make_rollout(9, 4, seed=seed)
        config = ProcessRewardConfig(mode=mode, weight=0.7, score_batch=5)
        rewards = ProcessReward(config, gamma=GAMMA, model=PixelModel())(rollout)
        for t, n in np.ndindex(rollout.valid.shape):
            now, after = (pixel_scores(frame[None])[0] for frame in frames_by_hand(rollout, t, n))
            expected = after
            if mode == "potential":
                expected = (0.0 if rollout.terminated[t, n] else GAMMA * after) - now
            if not rollout.valid[t, n]:
                expected = 0.0
            assert rewards.parts["process"][t, n] == pytest.approx(0.7 * expected, abs=1e-6), (t, n)
            assert rewards.parts["task"][t, n] == float(rollout.success[t, n] and rollout.valid[t, n])
        np.testing.assert_allclose(rewards.total, rewards.parts["task"] + rewards.parts["process"], atol=1e-7)


def test_potential_telescopes_over_each_episode():
    rollout = make_rollout(12, 3, seed=4)
    whole = np.ones_like(rollout.valid)  # whole episodes: no lost rows
    rollout = replace(rollout, valid=whole, executed=whole.astype(np.int32))
    config = ProcessRewardConfig(mode="potential", weight=0.3)
    process = ProcessReward(config, gamma=GAMMA, model=PixelModel())(rollout).parts["process"]
    checked = {"terminated": 0, "truncated": 0, "running": 0}
    finals = {
        (int(t), int(n)): pixel_scores(f[None])[0]
        for (t, n), f in zip(rollout.final_rows, rollout.final_frames, strict=True)
    }
    for n in range(3):
        begin = 0
        for t in range(12):
            ended = bool(rollout.terminated[t, n] or rollout.truncated[t, n])
            if not ended and t < 11:
                continue
            length = t - begin + 1
            shaped = sum(GAMMA**k * process[begin + k, n] for k in range(length))
            kind = "terminated" if rollout.terminated[t, n] else "truncated" if ended else "running"
            last = {"terminated": 0.0, "truncated": finals.get((t, n)), "running": None}[kind]
            if last is None:
                last = pixel_scores(rollout.last_observation.frames[n][None])[0]
            first = pixel_scores(rollout.frames[begin, n][None])[0]
            assert shaped == pytest.approx(0.3 * (GAMMA**length * last - first), abs=1e-5)
            checked[kind] += 1
            begin = t + 1
    assert min(checked.values()) > 0, checked


@pytest.mark.parametrize("mode", ["sum", "potential"])
def test_no_frame_is_scored_twice_and_none_in_vain(mode):
    rollout = rollout_with_all_endings()
    model = PixelModel()
    ProcessReward(ProcessRewardConfig(mode=mode), gamma=GAMMA, model=model)(rollout)
    scores = [score for score, _ in model.seen]
    assert len(scores) == len(set(scores))
    needed = set()
    for t, n in np.argwhere(rollout.valid):
        now, after = (float(pixel_scores(frame[None])[0]) for frame in frames_by_hand(rollout, t, n))
        if mode == "potential":
            needed.add(now)
        needed.add(after)  # the final frame too: the audit wants to know what the model thinks of it
    assert set(scores) == needed


def test_each_frame_goes_with_its_own_episodes_instruction():
    rollout = rollout_with_all_endings()
    texts = tuple(tuple(f"step {t} env {n}" for n in range(4)) for t in range(9))
    last = replace(rollout.last_observation, instructions=tuple(f"last env {n}" for n in range(4)))
    rollout = replace(rollout, instructions=texts, last_observation=last)
    model = PixelModel()
    ProcessReward(ProcessRewardConfig(mode="sum"), gamma=GAMMA, model=model)(rollout)
    expected = {}
    for t, n in np.ndindex(rollout.valid.shape):
        expected[float(pixel_scores(rollout.frames[t, n][None])[0])] = f"step {t} env {n}"
    for n in range(4):
        expected[float(pixel_scores(last.frames[n][None])[0])] = f"last env {n}"
    for (t, n), frame in zip(rollout.final_rows, rollout.final_frames, strict=True):
        expected[float(pixel_scores(frame[None])[0])] = f"step {t} env {n}"
    assert model.seen and all(expected[score] == text for score, text in model.seen)


def test_weight_zero_is_the_task_reward_and_scores_nothing():
    rollout, model = rollout_with_all_endings(), PixelModel()
    rewards = ProcessReward(ProcessRewardConfig(weight=0), gamma=GAMMA, model=model)(rollout)
    np.testing.assert_array_equal(rewards.total, TaskReward()(rollout).total)
    assert model.seen == []


def test_rollout_without_any_ending():
    rollout = make_rollout(4, 2)
    none = np.zeros((4, 2), dtype=bool)
    rollout = replace(
        rollout,
        terminated=none,
        truncated=none,
        success=none,
        final_observation=rollout.final_observation.rows(slice(0)),
        final_rows=rollout.final_rows[:0],
    )
    check_reward(ProcessReward(ProcessRewardConfig(), gamma=GAMMA, model=PixelModel()), rollout)


@pytest.mark.parametrize("mode", ["sum", "potential"])
def test_rewards_keep_the_contract(mode):
    check_reward(TaskReward())
    model = SmallRewardModel(image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=["reach the goal"])
    check_reward(ProcessReward(ProcessRewardConfig(mode=mode), gamma=GAMMA, model=model))


def test_the_contract_check_notices_each_breach():
    def breach(change):
        def reward(rollout):
            task = TaskReward()(rollout)
            total = change(task.total.copy(), rollout)
            # No `Rewards`: the tests' own shape checks would refuse it before the kit can.
            return SimpleNamespace(total=total, parts=task.parts if change is unsummed else {"task": total})

        return reward

    def infinite(total, _):
        total[1, 1] = np.inf
        return total

    def unsummed(total, rollout):
        return total + rollout.valid.astype(np.float32)

    for change, match in [
        (infinite, "finite"),
        (unsummed, "sum to the total"),
        (lambda total, _: total[:-1], "expected float32"),
        (lambda total, _: total.astype(np.float64), "expected float32"),
        (lambda total, _: total + 1, "not valid"),
        (lambda total, r: r.valid * np.arange(3, dtype=np.float32), "order of the environments"),
    ]:
        with pytest.raises(ExtensionError, match=match):
            check_reward(breach(change))


def test_a_missing_final_frame_is_our_own_mistake():
    rollout = rollout_with_all_endings()
    rollout = replace(
        rollout, final_rows=rollout.final_rows[1:], final_observation=rollout.final_observation.rows(slice(1, None))
    )
    with pytest.raises(AssertionError, match="no final frame"):
        frame_numbers(rollout)


def test_process_reward_without_model_says_what_to_do():
    with pytest.raises(ConfigError, match="reward fit"):
        ProcessReward(ProcessRewardConfig(), gamma=GAMMA)


def test_at_weight_zero_no_model_is_needed():
    rollout = make_rollout()
    rewards = ProcessReward(ProcessRewardConfig(weight=0), gamma=GAMMA)(rollout)
    assert not rewards.parts["process"].any() and np.array_equal(rewards.total, rewards.parts["task"])


def test_a_time_limit_that_counts_as_terminal_has_potential_zero():
    rollout = make_rollout()
    config = ProcessRewardConfig(mode="potential", weight=0.5)
    cut = ProcessReward(config, gamma=GAMMA, model=PixelModel())(rollout).parts["process"]
    terminal = ProcessReward(config, gamma=GAMMA, bootstrap_truncated=False, model=PixelModel())(rollout).parts[
        "process"
    ]
    finals = dict(zip(map(tuple, rollout.final_rows.tolist()), rollout.final_frames, strict=True))
    ended = rollout.truncated & rollout.valid
    assert ended.any()
    for t, n in np.argwhere(ended):
        score = PixelModel().score(finals[t, n][None], [rollout.instructions[t][n]], batch_size=1)[0]
        assert cut[t, n] - terminal[t, n] == pytest.approx(0.5 * GAMMA * score, abs=1e-5)
    np.testing.assert_array_equal(cut[~ended], terminal[~ended])
