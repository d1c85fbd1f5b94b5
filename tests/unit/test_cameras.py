"""Several cameras and a state travel from the environment to rollouts, policies and stores, each under its name."""

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from two_eyed_env import TwoEyed, TwoEyedConfig

from reachrl.config.demos import DemosSection, SFTSection
from reachrl.demos.expert import run_attempt
from reachrl.demos.readers import read_trajectories
from reachrl.demos.sft import train_sft
from reachrl.demos.store import TrajectoryStore, finish_store, iter_shard, write_shard
from reachrl.envs.base import Shown
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError, ExtensionError
from reachrl.rollout.collector import Collector
from reachrl.rollout.join import join_rollouts
from reachrl.testing.conformance_env import check_env
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.testing.policies import TablePolicy, TablePolicyConfig
from reachrl.testing.rewards import cut_rollout, make_rollout
from reachrl.types import Rollout, Start, Trajectory

OLD_STORE = Path(__file__).parent / "data" / "store_format_1"


def start(index: int) -> Start:
    return Start("red-square", "train", index)


def check_rows(images: dict, state: np.ndarray, ee_state: np.ndarray | None = None) -> None:
    """The second camera is the negative of the first, row by row."""
    assert list(images) == ["front", "back"]
    np.testing.assert_array_equal(images["back"], 255 - images["front"][..., ::2, ::2, :])
    assert state.shape == (*images["front"].shape[:-3], 3)
    if ee_state is not None:
        np.testing.assert_array_equal(state, 2 * ee_state[..., :3])


def test_memory_is_laid_out_from_the_observation_space():
    config = TwoEyedConfig(max_steps=3)
    check_env(TwoEyed(config))
    env = TwoEyed(config)
    expected, _ = env.reset(options={"start": start(1)})
    starts, following = [start(0), start(1)], [start(2), start(3)]
    still = np.zeros((2, 1, 4), np.float32)
    with VectorEnv(config, 2) as envs:
        assert envs.shown == Shown(cameras={"front": (24, 24, 3), "back": (12, 12, 3)}, state_size=3)
        first = envs.reset(starts, following)
        np.testing.assert_array_equal(first.images["back"][1], expected["images"]["back"])
        np.testing.assert_array_equal(first.state[1], expected["state"])
        steps = [envs.step(still, following) for _ in range(3)]
        check_rows(first.images, first.state)
        for step in steps[:-1]:
            check_rows(step.observation.images, step.observation.state, step.ee_state)
        last = steps[-1]
        assert last.truncated.all()
        # Without motion the last observation is the first, and the next one another episode's.
        check_rows(last.final_observation.images, last.final_observation.state, last.ee_state)
        np.testing.assert_array_equal(last.final_observation.images["back"], first.images["back"])
        assert (last.observation.images["back"] != first.images["back"]).any()


def test_a_state_that_is_not_finite_names_environment_start_and_step():
    with VectorEnv(TwoEyedConfig(nan_from=2), 1) as envs:
        envs.reset([start(4)], [start(5)])
        envs.step(np.zeros((1, 1, 4), np.float32), [start(5)])
        with pytest.raises(
            ExtensionError, match=r"environment 0 .*train start 4, step 2\): state is \(nan, nan, nan\)"
        ):
            envs.step(np.zeros((1, 1, 4), np.float32), [start(5)])


class OldKey(ReachEnv):
    def __init__(self, config):
        super().__init__(config)
        box = gym.spaces.Box(0, 255, (24, 24, 3), np.uint8)
        self.observation_space = gym.spaces.Dict({"image": box, "ee_state": self.observation_space["ee_state"]})


def test_frames_without_a_camera_are_refused_with_what_to_write():
    with pytest.raises(ExtensionError, match=r"key `image`.*frames go by their camera.*'images': gym\.spaces\.Dict"):
        check_env(OldKey(ReachConfig()))


def test_rollouts_keep_every_camera_the_state_and_the_frequency():
    torch.manual_seed(0)
    policy = TablePolicy(TablePolicyConfig(num_contexts=256, num_action_tokens=4))
    with VectorEnv(TwoEyedConfig(max_steps=4), 1) as envs:
        rollout = Collector(policy, envs, seed=3, temperature=1.0).collect(start, 7, policy_version=0)
    check_rows(rollout.images, rollout.state)
    check_rows(rollout.last_observation.images, rollout.last_observation.state)
    final = rollout.final_observation
    assert len(final) == len(rollout.episodes) == 1 and rollout.control_hz == 12.5
    check_rows(final.images, final.state, rollout.ee_state[3:4, 0])
    # The state is what was seen before a decision, the pose what it led to: row t's pose is row t + 1's state.
    np.testing.assert_array_equal(rollout.state[1:4, 0], 2 * rollout.ee_state[:3, 0, :3])
    assert (rollout.state[:3, 0] != 2 * rollout.ee_state[:3, 0, :3]).any()
    seen = rollout.decisions().rows(np.array([5]))
    np.testing.assert_array_equal(seen.images["back"][0], rollout.images["back"][5, 0])
    np.testing.assert_array_equal(seen.state[0], rollout.state[5, 0])


def two_eyed(rollout: Rollout) -> Rollout:
    """A made-up rollout with a second camera and a state."""

    def both(images: dict) -> dict:
        return {"front": images["camera"], "back": 255 - images["camera"][..., ::2, ::2, :]}

    def states(images: dict) -> np.ndarray:
        return images["camera"][..., 0, 0, :].astype(np.float32)

    seen = {name: getattr(rollout, name) for name in ("last_observation", "final_observation")}
    changed = {name: replace(each, images=both(each.images), state=states(each.images)) for name, each in seen.items()}
    return replace(rollout, images=both(rollout.images), state=states(rollout.images), control_hz=10.0, **changed)


def test_rollouts_are_joined_and_cut_by_camera():
    parts = [two_eyed(make_rollout(6, count, seed=count)) for count in (1, 2)]
    joined = join_rollouts(parts)
    assert joined.control_hz == 10.0 and joined.images["back"].shape == (6, 3, 16, 16, 3)
    for each in (joined, *cut_rollout(joined, [2, 4])):
        for images, state in (
            (each.images, each.state),
            *((part.images, part.state) for part in (each.last_observation, each.final_observation)),
        ):
            check_rows(images, state)
            np.testing.assert_array_equal(state, images["front"][..., 0, 0, :])
    for row, (t, n) in enumerate(joined.final_rows.tolist()):
        part, column = parts[n > 0], max(n - 1, 0)
        place = part.final_rows.tolist().index([t, column])
        np.testing.assert_array_equal(
            joined.final_observation.images["back"][row], part.final_observation.images["back"][place]
        )


def demonstration(index: int) -> Trajectory:
    config = DemosSection(action_noise=0.0)
    return run_attempt(TwoEyed(TwoEyedConfig()), start(index), config, np.random.default_rng(index))


def test_demonstrations_keep_them_and_come_back(tmp_path):
    written = [demonstration(index) for index in range(3)]
    for each in written:
        check_rows(each.images, each.state, each.ee_state)
        assert each.control_hz == 12.5
    write_shard(tmp_path / "a.parquet", written)
    for ours, theirs in zip(iter_shard(tmp_path / "a.parquet"), written, strict=True):
        assert list(ours.images) == list(theirs.images) and ours.control_hz == 12.5
        for camera in theirs.images:
            np.testing.assert_array_equal(ours.images[camera], theirs.images[camera])
        np.testing.assert_array_equal(ours.state, theirs.state)
    store = finish_store(tmp_path, ["a.parquet"])
    assert store.meta["cameras"] == {"front": [24, 24], "back": [12, 12]} and store.meta["state_size"] == 3
    data = store.load()
    check_rows(data.images, data.state)
    np.testing.assert_array_equal(data.state, np.concatenate([each.state[:-1] for each in written]))


def test_one_store_has_one_set_of_cameras(tmp_path):
    one = demonstration(0)
    blind = replace(one, images={"front": one.images["front"]})
    with pytest.raises(ConfigError, match=r"image\.back.*same cameras and state throughout"):
        write_shard(tmp_path / "a.parquet", [one, blind])
    write_shard(tmp_path / "a.parquet", [one])
    write_shard(tmp_path / "b.parquet", [blind])
    with pytest.raises(ConfigError, match="front 24x24, back 12x12 with 3 numbers of state and front 24x24 with"):
        finish_store(tmp_path, ["a.parquet", "b.parquet"])


def test_stores_of_format_1_are_read():
    """Written by the version before cameras had names."""
    store, t = TrajectoryStore(OLD_STORE), np.arange(4)
    first, second = store
    base = t[:, None, None, None] * 20 + np.arange(8)[:, None, None] * 3 + np.arange(8)[None, :, None] + np.arange(3)
    np.testing.assert_array_equal(first.images["image"], base)
    np.testing.assert_array_equal(second.frames, base + 7)
    assert first.state is None and first.control_hz is None and (first.success, second.success) == (True, False)
    data = store.load()
    assert data.state is None and list(data.images) == ["image"]
    np.testing.assert_array_equal(data.images["image"][3:], base[:3] + 7)
    assert [each.instruction for each in read_trajectories(OLD_STORE)] == ["reach the goal"] * 2


class Watching(TablePolicy):
    """Notes what it is asked to encode."""

    def encode(self, observation):
        self.seen.append(observation)
        return super().encode(observation)


def test_fine_tuning_shows_the_policy_every_camera_and_the_state(tmp_path):
    write_shard(tmp_path / "a.parquet", [demonstration(index) for index in range(3)])
    finish_store(tmp_path, ["a.parquet"])
    policy = Watching(TablePolicyConfig(num_contexts=256, num_action_tokens=4))
    policy.seen = []
    plain = SFTSection(epochs=1, batch_size=4, shift_pixels=0, brightness=0, contrast=0, colour=0, heldout_fraction=0)
    train_sft(policy, tmp_path, plain, seed=0, folder=tmp_path / "sft")
    assert policy.seen
    for observation in policy.seen:
        check_rows(observation.images, observation.state)
