"""Chunks of actions: the environment stops at an episode's end, and time, discounts and rewards count control steps."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_eyed_env import TwoEyed, TwoEyedConfig

from reachrl.algorithms.base import Batch
from reachrl.algorithms.grpo import GRPO
from reachrl.config.algorithm import Needs
from reachrl.config.demos import DemosSection, SFTSection
from reachrl.config.grpo import GRPOConfig
from reachrl.config.loading import load_config
from reachrl.demos.expert import run_attempt
from reachrl.demos.sft import train_sft
from reachrl.demos.store import finish_store, write_shard
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError
from reachrl.functional.gae import gae
from reachrl.rewards.episodes import whole_episodes
from reachrl.rewards.shaping import pay_at_ends, potential_difference
from reachrl.rewards.task import TaskReward
from reachrl.rollout.collector import Collector
from reachrl.rollout.episodes import EpisodePlayer
from reachrl.testing.conformance_batch import check_batch
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.testing.rewards import make_rollout
from reachrl.types import Observation, Start

sys.path.append(str(Path(__file__).parents[1] / "contract"))
from two_cameras import ChunkConfig, ChunkPolicy

CONFIG = ReachConfig(max_steps=10)
GAMMA = 0.9


def start(index: int) -> Start:
    return Start("red-square", "train", index)


def solution(which: Start) -> tuple[np.ndarray, list[dict]]:
    """The expert's actions f32[T 4], and what a single environment shows after each."""
    env, actions, seen = ReachEnv(CONFIG), [], []
    env.reset(options={"start": which})
    while True:
        actions.append(env.expert_action())
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        seen.append(observation)
        if terminated or truncated:
            assert terminated
            return np.stack(actions), seen


def solvable() -> Start:
    """A start that takes the expert five steps at least, and no multiple of three."""
    return next(start(i) for i in range(50) if len(solution(start(i))[0]) in (5, 7, 8))


def test_a_chunk_stops_at_success_and_at_the_time_limit():
    which, following = solvable(), start(60)
    actions, seen = solution(which)
    padded = np.concatenate([actions, np.full((3, 4), -1, np.float32)])
    still = np.zeros((len(padded), 4), np.float32)
    first = ReachEnv(CONFIG).reset(options={"start": following})[0]
    with VectorEnv(CONFIG, 2) as envs:
        envs.reset([which, which], [following, following])
        executed, number = [], 0
        while True:
            chunk = np.stack([padded[number : number + 3], still[:3]])
            step = envs.step(chunk, [following, following])
            executed.append(step.executed.tolist())
            number += 3
            if step.success[0]:
                break
            np.testing.assert_array_equal(step.observation.frames[0], seen[number - 1]["images"]["camera"])
        left = len(actions) % 3
        assert [row[0] for row in executed] == [3] * (len(actions) // 3) + [left] and step.terminated[0]
        np.testing.assert_array_equal(step.ee_state[0], seen[-1]["ee_state"])
        np.testing.assert_array_equal(step.final_observation.frames[0], seen[-1]["images"]["camera"])
        np.testing.assert_array_equal(step.observation.frames[0], first["images"]["camera"])
        while not step.truncated[1]:
            step = envs.step(np.zeros((2, 3, 4), np.float32), [following, following])
            executed.append(step.executed.tolist())
        assert [row[1] for row in executed] == [3, 3, 3, 1]
        with pytest.raises(ConfigError, match=r"takes actions f32\[2, K, 4\], got \[2, 4\]"):
            envs.send(np.zeros((2, 4), np.float32), [following, following])


def test_processes_keep_the_contract_of_environments_that_step_together():
    config = ReachConfig(max_steps=10, tasks=("red-square", "blue-square"))
    with VectorEnv(config, 3) as envs:
        check_batch(envs, solve=lambda which: solution(which)[0])


def by_control_steps(rewards, values, finals, terminated, truncated, valid, executed, lam, rng):
    """GAE of one environment over its control steps, each chunk laid out as single steps.

    What the critic would say inside a chunk is made up: with lambda 1 there it cancels.
    """
    advantages = np.zeros(len(rewards))
    running = 0.0
    for t in reversed(range(len(rewards))):
        if not valid[t]:
            running = 0.0
            continue
        inner = [values[t], *rng.normal(size=executed[t] - 1)]
        after = 0.0 if terminated[t] else finals[t] if truncated[t] else values[t + 1]
        worth = [*inner[1:], after]
        ended = terminated[t] or truncated[t]
        for k in reversed(range(executed[t])):
            last = k == executed[t] - 1
            delta = rewards[t][k] + GAMMA * worth[k] - inner[k]
            weight = (0.0 if ended else lam) if last else 1.0
            running = delta + GAMMA * weight * running
        advantages[t] = running
    return advantages


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_advantages_of_chunks_are_those_of_their_control_steps(seed):
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(1, 9))
    executed = rng.integers(1, 6, steps)
    inside = [rng.normal(size=count) for count in executed]  # the reward of every control step
    seen = np.array([sum(GAMMA**k * r for k, r in enumerate(each)) for each in inside])
    values, finals = rng.normal(size=steps + 1), rng.normal(size=steps)
    ends = rng.integers(0, 5, steps)
    flags = [ends == 0, ends == 1, ends != 2]
    expected = by_control_steps(inside, values, finals, *flags, executed, 0.8, rng)
    advantages, returns = gae(
        seen[:, None].astype(np.float32),
        values[:, None].astype(np.float32),
        finals[:, None].astype(np.float32),
        *(flag[:, None] for flag in flags),
        executed[:, None].astype(np.int32) * flags[2][:, None],
        gamma=GAMMA,
        gae_lambda=0.8,
    )
    np.testing.assert_allclose(advantages[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(returns[:, 0], expected + values[:-1], atol=1e-5)


def test_a_success_inside_a_chunk_is_discounted_to_the_chunks_beginning():
    rollout = make_rollout(2, 2)
    success = np.array([[False, True], [True, False]])
    rollout = replace(
        rollout,
        success=success,
        terminated=success,
        valid=np.ones((2, 2), bool),
        executed=np.array([[4, 3], [1, 4]], np.int32),
    )
    rewards = TaskReward(gamma=GAMMA)(rollout)
    np.testing.assert_allclose(rewards.total, [[0, GAMMA**2], [1, 0]], rtol=1e-6)
    assert rollout.num_env_steps == 12


def test_potentials_of_chunks_telescope_over_control_steps():
    rng = np.random.default_rng(1)
    executed = np.array([3, 1, 4, 2, 5], np.int32)
    clock = np.concatenate([[0], np.cumsum(executed)])
    scores = rng.random(6).astype(np.float32)
    terminal = np.zeros((5, 1), bool)
    terminal[-1] = True
    paid = potential_difference(scores[:-1, None], scores[1:, None], terminal, executed[:, None], gamma=GAMMA)[:, 0]
    assert GAMMA ** clock[:-1] @ paid == pytest.approx(-scores[0], abs=1e-6)
    ends = np.array([1, 4])
    segments = pay_at_ends(scores, ends, executed, potential=True, gamma=GAMMA, terminal=True)
    assert set(np.flatnonzero(segments)) == {1, 4}
    for first in (0, 2):  # from the start of any segment on
        discount = GAMMA ** (clock[first:-1] - clock[first])
        assert discount @ segments[first:] == pytest.approx(discount @ paid[first:], abs=1e-6)
    as_sum = pay_at_ends(scores, ends, executed, potential=False, gamma=GAMMA, terminal=True)
    np.testing.assert_allclose(as_sum, [0, scores[2], 0, 0, GAMMA**4 * scores[5]], rtol=1e-6)


# ---- a policy that answers with chunks of eight ----


@pytest.fixture
def chunk_policy():
    torch.manual_seed(0)
    return ChunkPolicy(ChunkConfig())


TWO_EYED = TwoEyedConfig(max_steps=13, execute=5)


def collector(policy, envs, **options) -> Collector:
    return Collector(policy, envs, seed=3, temperature=1.0, max_steps=TWO_EYED.max_steps, **options)


def test_a_rollout_of_chunks_is_its_control_steps_by_hand(chunk_policy):
    with VectorEnv(TWO_EYED, 2) as envs:
        rollout = collector(chunk_policy, envs).collect(start, 6, policy_version=0)
    assert not rollout.success.any()  # random motion: all episodes end at their limit
    np.testing.assert_array_equal(rollout.executed, np.array([5, 5, 3, 5, 5, 3])[:, None].repeat(2, 1))
    np.testing.assert_array_equal(rollout.truncated, np.array([0, 0, 1, 0, 0, 1], bool)[:, None].repeat(2, 1))
    assert [(each.num_steps, each.num_decisions) for each in rollout.episodes] == [(13, 3)] * 4
    assert rollout.num_env_steps == 52
    tokens = torch.from_numpy(rollout.token_ids.reshape(12, -1))
    actions = chunk_policy.decode_actions(tokens, tokens > 0).reshape(6, 2, 8, 4)
    env = TwoEyed(TWO_EYED)
    for n in range(2):
        for first, number in ((0, n), (3, n + 2)):  # the episodes of environment n
            seen, _ = env.reset(options={"start": start(number)})
            for t in range(first, first + 3):
                np.testing.assert_array_equal(rollout.images["back"][t, n], seen["images"]["back"])
                for action in actions[t, n, : rollout.executed[t, n]]:
                    seen, *_ = env.step(action)
                np.testing.assert_array_equal(rollout.ee_state[t, n], seen["ee_state"])
    assert [(first, last) for _, first, last, _ in whole_episodes(rollout)] == [(0, 2), (0, 2), (3, 5), (3, 5)]


def test_a_resumed_collector_replays_what_was_carried_out(chunk_policy):
    with VectorEnv(TWO_EYED, 2) as envs:
        one = collector(chunk_policy, envs)
        one.collect(start, 5, policy_version=0)
        state = json.loads(json.dumps(one.state()))
        whole = one.collect(start, 4, policy_version=0)
    assert [(len(row["actions"]), row["decisions"]) for row in state] == [(10, 2)] * 2
    with VectorEnv(TWO_EYED, 2) as envs:
        other = collector(chunk_policy, envs)
        other.load_state(state)
        resumed = other.collect(start, 4, policy_version=0)
    for name in ("token_ids", "behaviour_logprobs", "executed", "ee_state", "truncated"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name), err_msg=name)
    np.testing.assert_array_equal(resumed.images["back"], whole.images["back"])
    assert resumed.episodes == whole.episodes


def test_whole_episodes_fit_by_their_decisions(chunk_policy):
    """13 control steps are three decisions: seven decisions hold two episodes."""
    with VectorEnv(TWO_EYED, 2) as envs:
        needs = Needs(whole_episodes=True, group_size=2)
        rollout = collector(chunk_policy, envs, needs=needs).collect(start, 7, policy_version=0)
    assert len(rollout.valid) == 6 and len(rollout.episodes) == 4 and rollout.valid.all()


def test_evaluation_counts_control_steps_and_keeps_the_actions_carried_out(chunk_policy):
    with VectorEnv(TWO_EYED, 2) as envs:
        player = EpisodePlayer(chunk_policy, envs, mode="sampled", temperature=1.0, seed=0)
        (episode,) = player.play([start(0)], record=lambda _: True)
    assert episode.num_steps == 13 and [len(turn.actions) for turn in episode.turns] == [5, 5, 3]
    env = TwoEyed(TWO_EYED)
    env.reset(options={"start": start(0)})
    for action in np.concatenate([turn.actions for turn in episode.turns]):
        seen, _, _, truncated, _ = env.step(action)
    assert truncated
    np.testing.assert_array_equal(episode.final_observation.images["front"][0], seen["images"]["front"])


def test_targets_are_the_next_actions_and_the_last_one_again(tmp_path, chunk_policy):
    demos = [
        run_attempt(TwoEyed(TwoEyedConfig()), start(i), DemosSection(action_noise=0), np.random.default_rng(i))
        for i in (0, 1, 2)
    ]
    write_shard(tmp_path / "a.parquet", demos)
    chunks = finish_store(tmp_path, ["a.parquet"]).load().chunks(8)
    row = 0
    for demo in demos:
        assert len(demo.actions) > 1
        for t in range(len(demo.actions)):
            wanted = [demo.actions[min(t + k, len(demo.actions) - 1)] for k in range(8)]
            np.testing.assert_array_equal(chunks[row], wanted)
            row += 1
    assert row == len(chunks)
    plain = {"shift_pixels": 0, "brightness": 0, "contrast": 0, "colour": 0}
    config = SFTSection(epochs=200, batch_size=8, lr=0.005, heldout_fraction=0, **plain)
    result = train_sft(chunk_policy, tmp_path, config, seed=0, folder=tmp_path / "sft")
    found = np.stack([chunk_policy.predict(**moment(demo)) for demo in demos])
    wanted = np.stack([demo.actions[np.minimum(np.arange(8), len(demo.actions) - 1)] for demo in demos])
    assert found.shape == (3, 8, 4) and np.abs(found - wanted).mean() < 0.1
    assert result.action_error < 0.1


def moment(demo) -> dict:
    images = {camera: frames[0] for camera, frames in demo.images.items()}
    return {"images": images, "instruction": demo.instruction, "state": demo.state[0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["env.execute=9"], r"env\.execute=9 actions are to be carried out of the 8.*lower env\.execute to 8"),
        (["reward.kind=process", "reward_model.num_frames=2"], r"only every 8th control step is seen"),
        (
            ["algorithm.kind=grpo", "rollout.num_steps=3", "env.execute=4"],
            r"those of 4 decisions \(env\.max_steps=15\)",
        ),
    ],
)
def test_configurations_that_chunks_cannot_keep_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config("toy", ["policy.kind=two_cameras:ChunkPolicy", *changes])


def test_a_policy_that_sees_more_than_is_shown_is_refused(chunk_policy):
    with VectorEnv(ReachConfig(), 1) as envs, pytest.raises(ConfigError, match=r"2 cameras, and there is 1 \(camera\)"):
        collector(chunk_policy, envs)
    chunk_policy.num_cameras = 1
    with VectorEnv(ReachConfig(), 1) as envs, pytest.raises(ConfigError, match="state of 3 numbers, and there is no"):
        collector(chunk_policy, envs)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_only_tokens_of_actions_carried_out_are_credited(chunk_policy, level):
    """One step of a whole update against autograd over the executed part of each answer."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8) for name in ("front", "back")}
    state = rng.random((9, 3), np.float32)
    inputs = chunk_policy.encode(Observation(images=images, instructions=("",) * 9, state=state))
    before = copy.deepcopy(chunk_policy)
    sample = chunk_policy.act(inputs, noise=lambda _: torch.from_numpy(rng.gumbel(size=(9, 21)).astype(np.float32)))
    executed = torch.tensor([1, 2, 3, 4, 5, 3, 2, 1, 2], dtype=torch.int32)
    malformed = torch.arange(9) == 8  # credited as a whole
    advantages = torch.randn(9)
    batch = Batch(
        inputs=inputs.rows, rows=torch.arange(9), token_ids=sample.token_ids, token_mask=sample.token_mask,
        malformed=malformed, executed=executed, behaviour_logprobs=sample.logprobs, old_logprobs=sample.logprobs,
        advantages=advantages,
    )  # fmt: skip
    config = GRPOConfig(
        epochs=1, minibatch_size=9, micro_batch_size=4, lr=1e-2, entropy_coef=0.0, ratio_level=level,
        max_grad_norm=1e9, weight_decay=0.0,
    )  # fmt: skip
    GRPO(config, chunk_policy, seed=0, temperature=1.0).update(batch, iteration=0)

    logprobs = before.evaluate(inputs, sample.token_ids, sample.token_mask).logprobs.reshape(9, 8, 4)
    losses = []
    for row in range(9):
        own = logprobs[row, : 8 if malformed[row] else executed[row]]
        parts = {"token": own.reshape(-1), "action": own.sum(1), "chunk": own.sum()[None]}[level]
        losses.append(-(advantages[row] * (parts - parts.detach()).exp()).mean())
    groups = before.parameter_groups()
    torch.stack(losses).mean().backward()
    torch.optim.AdamW([*groups["vision"], *groups["trunk"]], lr=1e-2, eps=1e-5, weight_decay=0.0).step()
    torch.testing.assert_close(chunk_policy.head.weight, before.head.weight, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(chunk_policy.trunk[0].weight, before.trunk[0].weight, atol=1e-5, rtol=1e-3)
