"""The oracle reward against a step-by-step brute force, and the simulator's progress on its way there."""

from dataclasses import replace

import numpy as np
import pytest

from reachrl.config.reward import OracleRewardConfig
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ExtensionError
from reachrl.rewards.oracle import OracleReward
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.testing.rewards import check_reward, make_rollout
from reachrl.types import Start


@pytest.mark.parametrize("bootstrap", [True, False])
def test_every_step_against_brute_force(bootstrap):
    rollout = make_rollout(9, 4, seed=3)
    reward = OracleReward(OracleRewardConfig(weight=0.7), gamma=0.9, bootstrap_truncated=bootstrap)(rollout)
    for t, n in np.ndindex(rollout.valid.shape):
        before, after = rollout.progress[t, n]
        over = rollout.terminated[t, n] or (rollout.truncated[t, n] and not bootstrap)
        expected = 0.7 * ((0.0 if over else 0.9 * after) - before) if rollout.valid[t, n] else 0.0
        assert reward.parts["process"][t, n] == pytest.approx(expected, abs=1e-6)
        assert reward.parts["task"][t, n] == (rollout.success[t, n] and rollout.valid[t, n])


def test_the_shaping_of_a_whole_episode_telescopes():
    rollout = make_rollout(5, 1, seed=0)
    flow = np.linspace(0.0, 0.9, 6, dtype=np.float32)
    never = np.zeros((5, 1), bool)
    ended = never.copy()
    ended[-1] = True
    rollout = replace(
        rollout,
        progress=np.stack([flow[:-1], flow[1:]], axis=-1)[:, None],
        valid=~never,
        terminated=ended,
        truncated=never,
        success=ended,
    )
    process = OracleReward(OracleRewardConfig(weight=1.0), gamma=0.9)(rollout).parts["process"][:, 0]
    discounted = sum(0.9**t * float(r) for t, r in enumerate(process))
    assert discounted == pytest.approx(-flow[0], abs=1e-6)  # nothing but the start remains


def test_it_keeps_the_contract_and_ignores_rows_without_data():
    reward = OracleReward(OracleRewardConfig(), gamma=0.99)
    check_reward(reward)
    rollout = make_rollout()
    lost = replace(rollout, progress=np.where(rollout.valid[..., None], rollout.progress, np.float32(np.nan)))
    check_reward(reward, lost)


def test_an_environment_without_progress_is_refused():
    rollout = make_rollout()
    with pytest.raises(ExtensionError, match=r'info\["progress"\]'):
        OracleReward(OracleRewardConfig(), gamma=0.99)(
            replace(rollout, progress=np.full_like(rollout.progress, np.nan))
        )


def test_progress_travels_from_the_simulator_through_ends_and_replays():
    starts = [Start("red-square", "train", 0), Start("blue-square", "train", 1)]
    upcoming = [Start("green-square", "train", 2)] * 2
    config = ReachConfig(max_steps=3)
    alone = ReachEnv(config)
    actions = np.zeros((5, 2, 4), np.float32)
    by_hand = np.zeros((5, 2, 2), np.float32)
    for n, start in enumerate(starts):
        _, info = alone.reset(options={"start": start})
        for t in range(5):
            before, actions[t, n] = info["progress"], 0.5 * alone.expert_action()
            *_, terminated, truncated, info = alone.step(actions[t, n])
            by_hand[t, n] = before, info["progress"]
            if terminated or truncated:
                _, info = alone.reset(options={"start": upcoming[n]})
    assert by_hand[:, :, 0].any() and (by_hand[3, :, 0] == 0).all()  # an episode ended after the third decision
    with VectorEnv(config, num_envs=2) as envs:
        envs.reset(starts, upcoming)
        for t in range(5):
            np.testing.assert_array_equal(envs.step(actions[t, :, None], upcoming).progress, by_hand[t])
        envs.replay(starts, [actions[:2, n] for n in range(2)])
        np.testing.assert_array_equal(envs.step(actions[2, :, None], upcoming).progress, by_hand[2])
