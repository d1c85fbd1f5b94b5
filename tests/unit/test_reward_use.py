"""How scores become rewards: remembered answers, clips, segments, scaling, clipping, and what a resumed run needs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from reachrl.config.loading import load_config
from reachrl.config.reward import ProcessRewardConfig
from reachrl.errors import ConfigError, ExtensionError
from reachrl.rewards.base import Reward
from reachrl.rewards.episodes import episode_parts, frame_numbers
from reachrl.rewards.process.reward import ProcessReward
from reachrl.rewards.process.scorer import FrameScorer, clip_numbers
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.rewards.running_scale import RunningScale
from reachrl.rewards.shaping import pay_at_ends, pay_new_highs
from reachrl.testing.rewards import check_borders, check_reward, cut_rollout, make_rollout, one_camera
from reachrl.types import Episode, Rewards, Start

GAMMA = 0.9


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return SmallRewardModel(
        image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=["reach the goal"], **changes
    ).eval()


def test_the_made_up_rollout_has_the_cameras_and_the_state_that_are_asked_for():
    rollout = make_rollout(4, 2, cameras=["front", "wrist"], state_size=3)
    assert list(rollout.images) == list(rollout.final_observation.images) == ["front", "wrist"]
    assert rollout.state is not None and rollout.state.shape == (4, 2, 3)
    assert rollout.last_observation.state is not None and rollout.last_observation.state.shape == (2, 3)
    assert (rollout.images["front"] != rollout.images["wrist"]).any()
    parts = cut_rollout(rollout, [2])
    np.testing.assert_array_equal(parts[0].last_observation.state, rollout.state[2])


class Near(Reward):
    """Pays what a wrist camera and the state say."""

    def __call__(self, rollout):
        seen = rollout.state[..., 0] + rollout.images["wrist"].mean(axis=(2, 3, 4)) / 255
        paid = np.where(rollout.valid, seen, 0).astype(np.float32)
        return Rewards(total=paid, parts={"near": paid})


def test_a_reward_that_reads_a_state_is_told_how_to_be_checked():
    for check in (lambda: check_reward(Near()), lambda: check_borders(Near, gamma=0.9)):
        with pytest.raises(
            ExtensionError, match=r"Near raised TypeError: .*make_rollout\(cameras=\['front'\], state_size=8\)"
        ):
            check()
    rollout = make_rollout(8, 3, cameras=["wrist"], state_size=2)
    check_reward(Near(), rollout)
    check_borders(Near, gamma=0.9, rollout=rollout)


def episodes_by_hand(rollout):
    """{(t, n): numbers of the frames of the same episode up to and with the one step (t, n) led to}."""
    now, after = frame_numbers(rollout)
    seen = {}
    for n in range(rollout.valid.shape[1]):
        path = []
        for t in range(rollout.valid.shape[0]):
            path = path or [now[t, n]]
            path = [*path, after[t, n]]
            seen[t, n] = path
            if rollout.terminated[t, n] or rollout.truncated[t, n] or not rollout.valid[t, n]:
                path = []
    return seen


@pytest.mark.parametrize(("num_frames", "frame_stride"), [(1, 1), (2, 1), (3, 2)])
def test_clips_never_reach_beyond_their_episode(num_frames, frame_stride):
    for seed in range(4):
        rollout = make_rollout(9, 4, seed=seed)
        _, after = frame_numbers(rollout)
        numbers = clip_numbers(rollout, num_frames=num_frames, frame_stride=frame_stride)
        for (t, n), path in episodes_by_hand(rollout).items():
            if not rollout.valid[t, n]:
                continue
            last = len(path) - 1
            expected = [path[max(last - k * frame_stride, 0)] for k in reversed(range(num_frames))]
            assert numbers[after[t, n]].tolist() == expected, (t, n)


def test_scores_of_clips_equal_the_models_own():
    rollout = make_rollout(9, 4, seed=1)
    model = small_model(num_frames=2)
    _, after = frame_numbers(rollout)
    bank = np.concatenate(
        [rollout.frames.reshape(-1, 32, 32, 3), rollout.last_observation.frames, rollout.final_frames]
    )
    scores = FrameScorer(model, batch_size=8).scores(rollout, np.unique(after))
    for (t, n), path in episodes_by_hand(rollout).items():
        if rollout.valid[t, n]:
            alone = model.score(bank[path[-2:]][None], ["reach the goal"], batch_size=8)
            assert scores[after[t, n]] == alone[0]


def test_frames_that_come_back_are_remembered_by_content_and_instruction():
    rollout = make_rollout(6, 3, seed=0)
    _, after = frame_numbers(rollout)
    model = small_model()
    scorer = FrameScorer(model, batch_size=4)
    first = scorer.scores(rollout, np.unique(after))
    count = scorer.num_scored
    assert count == len(np.unique(after))
    np.testing.assert_array_equal(scorer.scores(rollout, np.unique(after)), first)
    assert scorer.num_scored == count
    texts = tuple(tuple("reach a goal" for _ in row) for row in rollout.instructions)
    scorer.scores(replace(rollout, instructions=texts), np.unique(after))
    assert scorer.num_scored > count
    same = replace(rollout, images={"camera": np.zeros_like(rollout.frames)})
    before = scorer.num_scored
    scorer.scores(same, np.arange(18))
    assert scorer.num_scored == before + 1


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("reachrl.rewards.process.scorer.CACHE_SIZE", 5)
    rollout = make_rollout(6, 3, seed=0)
    fresh, scorer = FrameScorer(small_model(), batch_size=4), FrameScorer(small_model(), batch_size=4)
    for _ in range(2):
        np.testing.assert_array_equal(
            scorer.scores(rollout, np.arange(18)), fresh.scores(rollout, np.arange(18)), strict=True
        )
    assert len(scorer._known) == 5


@pytest.mark.parametrize("terminal", [True, False])
def test_paying_a_potential_at_segment_ends_keeps_every_segments_return(terminal):
    rng = np.random.default_rng(0)
    scores = rng.random(10).astype(np.float32)
    ends = np.array([2, 3, 8])
    paid = pay_at_ends(scores, ends, np.ones(9, np.int32), potential=True, gamma=GAMMA, terminal=terminal)
    final = scores.copy()
    if terminal:
        final[-1] = 0
    each = GAMMA * final[1:] - final[:-1]
    assert set(np.flatnonzero(paid)) == {2, 3, 8}
    for start in (0, 3, 4):  # from the start of any segment on, the discounted sum is the same
        discount = GAMMA ** np.arange(9 - start)
        assert discount @ paid[start:] == pytest.approx(discount @ each[start:], abs=1e-6)
    as_sum = pay_at_ends(scores, ends, np.ones(9, np.int32), potential=False, gamma=GAMMA, terminal=terminal)
    assert as_sum.tolist() == [0, 0, scores[3], scores[4], 0, 0, 0, 0, scores[9]]


@pytest.mark.parametrize("gamma", [0.05, 0.04, 0.0])
def test_a_discount_is_refused_where_segments_would_pay_infinities(gamma):
    scores, end = np.ones(31, np.float32), np.array([29])
    with np.errstate(over="ignore", divide="ignore"):
        paid = pay_at_ends(scores, end, np.ones(30, np.int32), potential=True, gamma=gamma, terminal=True)
    changes = ["reward.pay=segments", "env.max_steps=30", f"algorithm.gamma={gamma}"]
    if np.isfinite(paid).all():
        assert load_config("toy", changes).algorithm.gamma == gamma == 0.05
    else:
        with pytest.raises(ConfigError, match="no longer a finite number over env.max_steps=30"):
            load_config("toy", changes)


def test_segments_end_where_the_gripper_changes_and_where_the_episode_does():
    rollout = make_rollout(12, 2, seed=2)
    state = rollout.ee_state.copy()
    state[..., 3] = 1.0
    state[6:, 0, 3] = 0.0  # the first environment closes its gripper at step 6
    never = np.zeros((12, 2), bool)
    ended = never.copy()
    ended[8, 1] = True
    rollout = replace(
        rollout,
        ee_state=state,
        valid=~never,
        terminated=never,
        truncated=ended,
        success=never,
        final_rows=np.array([[8, 1]]),
        final_observation=one_camera(rollout.frames[:1, 0]),
    )
    assert episode_parts(rollout) == [(0, 11, 0), (0, 8, 1), (9, 11, 1)]
    config = ProcessRewardConfig(mode="sum", pay="segments", weight=1.0)
    process = ProcessReward(config, gamma=GAMMA, model=small_model())(rollout).parts["process"]
    assert np.argwhere(process).tolist() == [[5, 0], [8, 1], [11, 0], [11, 1]]


@pytest.mark.parametrize(
    "options",
    [
        {"pay": "segments"},
        {"pay": "segments", "mode": "sum"},
        {"pay": "keyframes", "mode": "sum"},
        {"normalise": True},
        {"clip": 0.01},
    ],
)
def test_every_use_keeps_the_contract(options):
    check_reward(ProcessReward(ProcessRewardConfig(**options), gamma=GAMMA, model=small_model()))


def test_the_running_scale_is_that_of_everything_seen():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, size) for size in (1, 7, 0, 40)]
    scale = RunningScale()
    assert scale.deviation == 1.0
    for batch in batches:
        scale.update(batch)
    assert scale.deviation == pytest.approx(np.concatenate(batches).std(), rel=1e-12)
    other = RunningScale()
    other.load_state_dict(scale.state_dict())
    assert other.deviation == scale.deviation


def test_normalised_and_clipped_rewards_by_hand_and_after_a_resume():
    rollouts = [make_rollout(9, 4, seed=seed) for seed in range(3)]
    plain = ProcessReward(ProcessRewardConfig(mode="sum", weight=1.0), gamma=GAMMA, model=small_model())
    config = ProcessRewardConfig(mode="sum", weight=0.5, normalise=True, clip=1.0)
    reward = ProcessReward(config, gamma=GAMMA, model=small_model())
    seen, results = [], []
    for rollout in rollouts:
        raw = plain(rollout).parts["process"]
        seen.append(raw[rollout.valid])
        expected = 0.5 * np.clip(raw / np.concatenate(seen).std(dtype=np.float64), -1, 1)
        results.append(reward(rollout).parts["process"])
        np.testing.assert_allclose(results[-1], expected, rtol=1e-5)
    first = ProcessReward(config, gamma=GAMMA, model=small_model())
    first(rollouts[0])
    resumed = ProcessReward(config, gamma=GAMMA, model=small_model())
    resumed.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(resumed(rollouts[1]).parts["process"], results[1])


def test_a_refitted_model_is_used_from_the_next_rollout_on_and_found_again():
    rollout = make_rollout(9, 4, seed=0)
    versions = [small_model(0), small_model(1)]

    def refit(given, iteration, model):
        assert given is rollout and model is versions[0]
        return (versions[1], {"reward_model/version": 1.0}) if iteration == 2 else None

    config = ProcessRewardConfig(mode="sum")
    reward = ProcessReward(config, gamma=GAMMA, model=versions[0], refit=refit)
    before = reward(rollout).total
    assert reward.adapt(rollout, iteration=1) == {} and reward.version == 0
    assert reward.adapt(rollout, iteration=2) == {"reward_model/version": 1.0}
    after = reward(rollout).total
    assert not np.array_equal(before, after)  # nothing remembered of the old model
    resumed = ProcessReward(config, gamma=GAMMA, model=versions[0], read_version=lambda version: versions[version])
    resumed.load_state_dict(reward.state_dict())
    np.testing.assert_array_equal(resumed(rollout).total, after)


def stepped(reward, rollout, borders):
    """Process reward of every step, in rollouts that begin at `borders`, resumed from JSON at each of them."""
    paid, state = [], None
    for part in cut_rollout(rollout, borders):
        one = reward()
        if state is not None:
            one.load_state_dict(json.loads(json.dumps(state)))
        paid.append(one(part).parts["process"])
        state = one.state_dict()
    return np.concatenate(paid)


@pytest.mark.parametrize("pay", ["steps", "segments"])
@pytest.mark.parametrize(("num_frames", "frame_stride"), [(1, 1), (2, 1), (3, 2)])
def test_a_potential_telescopes_over_rollout_borders(num_frames, frame_stride, pay):
    config = ProcessRewardConfig(weight=1.0, pay=pay)
    model = small_model(num_frames=num_frames, frame_stride=frame_stride)
    rollout = make_rollout(14, 3, seed=5)
    check_borders(lambda: ProcessReward(config, gamma=GAMMA, model=model), gamma=GAMMA, rollout=rollout)


def test_a_keyframe_is_paid_once_when_it_is_reached():
    scores = np.array([0.25, 0.5, 0.375, 0.5, 0.75, 0.125], np.float32)
    ones = np.ones(6, np.int32)
    paid, highest = pay_new_highs(scores, 0.375, ones, gamma=GAMMA)
    assert paid.tolist() == [0, 0.125, 0, 0, 0.25, 0] and highest == 0.75
    chunks, _ = pay_new_highs(scores, 0.375, 3 * ones, gamma=0.5)  # a frame is seen after the third step of a chunk
    assert chunks.tolist() == [0, 0.03125, 0, 0, 0.0625, 0]
    with pytest.raises(ValidationError, match=r"set reward\.mode=sum"):
        ProcessRewardConfig(pay="keyframes")


def test_keyframes_pay_what_an_episodes_best_frame_exceeds_its_first_by():
    rollout, model = running_rollout(), small_model()
    config = ProcessRewardConfig(mode="sum", pay="keyframes", weight=1.0)
    paid = ProcessReward(config, gamma=GAMMA, model=model)(rollout).parts["process"]
    now, after = frame_numbers(rollout)
    scores = FrameScorer(model, batch_size=8).scores(rollout, np.arange(after.max() + 1))
    best = np.maximum(scores[after].max(axis=0), scores[now[0]])
    np.testing.assert_allclose(paid.sum(axis=0), best - scores[now[0]], atol=1e-6)
    assert (paid >= 0).all() and (paid > 0).any() and (paid == 0).any()


@pytest.mark.parametrize(("mode", "pay"), [("potential", "steps"), ("sum", "steps"), ("sum", "keyframes")])
def test_every_step_earns_the_same_wherever_rollouts_end(mode, pay):
    """Also what a clip sees of frames before the border: step by step, not only in sums."""
    model = small_model(num_frames=3, frame_stride=2)
    rollout = make_rollout(14, 3, seed=6)
    config = ProcessRewardConfig(mode=mode, pay=pay, weight=1.0)
    whole = ProcessReward(config, gamma=GAMMA, model=model)(rollout).parts["process"]
    for borders in ([3], [5, 6], list(range(1, 14))):
        cut = stepped(lambda: ProcessReward(config, gamma=GAMMA, model=model), rollout, borders)
        np.testing.assert_allclose(cut, whole, atol=1e-6, err_msg=str(borders))


def running_rollout(num_steps=12, num_envs=2, seed=7):
    """One long episode in each environment, which the last step truncates."""
    rollout, never = make_rollout(num_steps, num_envs, seed=seed), np.zeros((num_steps, num_envs), bool)
    last = never.copy()
    last[-1] = True
    return replace(
        rollout, terminated=never, success=never, truncated=last, valid=~never,
        executed=np.ones_like(rollout.executed),
        final_rows=np.array([[num_steps - 1, n] for n in range(num_envs)]),
        final_observation=rollout.last_observation,
        episodes=tuple(
            Episode(
                start=Start("reach", "train", n), success=False, num_steps=num_steps, num_decisions=num_steps, env=n
            )
            for n in range(num_envs)
        ),
    )  # fmt: skip


def test_a_refit_in_mid_episode_keeps_the_potential_that_was_paid():
    rollout, models = running_rollout(), [small_model(0, num_frames=2), small_model(1, num_frames=2)]
    first, second = cut_rollout(rollout, [5])
    reward = ProcessReward(
        ProcessRewardConfig(weight=1.0), gamma=GAMMA, model=models[0], refit=lambda *_: (models[1], {})
    )
    paid = [reward(first).parts["process"]]
    reward.adapt(first, iteration=0)
    paid.append(reward(second).parts["process"])
    for n in range(2):
        frames = np.stack([rollout.frames[0, n]] * 2), np.stack([rollout.frames[-1, n], rollout.final_frames[n]])
        begin, end = (m.score(f[None], ["reach the goal"])[0] for m, f in zip(models, frames, strict=True))
        earned = GAMMA ** np.arange(12) @ np.concatenate(paid)[:, n]
        assert earned == pytest.approx(GAMMA**12 * end - begin, abs=1e-5)


def test_a_running_scale_never_changes_within_an_episode():
    rollout, model = running_rollout(), small_model()
    plain = ProcessReward(ProcessRewardConfig(weight=1.0), gamma=GAMMA, model=model)(rollout).parts["process"]
    config = ProcessRewardConfig(weight=1.0, normalise=True)
    scaled = stepped(lambda: ProcessReward(config, gamma=GAMMA, model=model), rollout, [4, 9])
    np.testing.assert_allclose(scaled, plain / plain[:4].std(dtype=np.float64), rtol=1e-5)
    earned, unscaled = (GAMMA ** np.arange(12) @ paid for paid in (scaled, plain))
    np.testing.assert_allclose(earned, unscaled / plain[:4].std(dtype=np.float64), rtol=1e-4)


def test_a_rollout_of_other_episodes_is_scored_afresh():
    model = small_model(num_frames=2)
    reward = ProcessReward(ProcessRewardConfig(weight=1.0), gamma=GAMMA, model=model)
    first, second = cut_rollout(running_rollout(), [5])
    other = running_rollout(seed=8)
    expected = ProcessReward(ProcessRewardConfig(weight=1.0), gamma=GAMMA, model=model)(other).total
    reward(first)
    state = reward.state_dict()
    np.testing.assert_array_equal(reward(other).total, expected)
    reward.load_state_dict(state)
    np.testing.assert_array_equal(
        np.concatenate([reward(second).total]), stepped(lambda: reward, running_rollout(), [5])[5:]
    )
