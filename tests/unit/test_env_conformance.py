"""The conformance kit passes a sound environment and names each broken promise of an unsound one."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reachrl.envs.base import check_start, start_option
from reachrl.errors import ExtensionError
from reachrl.rollout.episodes import check_validation
from reachrl.testing.conformance_env import check_env
from reachrl.testing.envs import ReachConfig, ReachEnv
from reachrl.types import SPLITS, Start

CONFIG = ReachConfig(max_steps=8)


def test_the_toy_keeps_the_contract():
    check_env(ReachEnv(ReachConfig()), expert=True)


class Backwards(ReachEnv):
    """Its expert goes the wrong way to one square."""

    def expert_action(self) -> np.ndarray:
        return super().expert_action() * np.float32(-1 if self._target == 1 else 1)


def test_an_expert_is_judged_by_whole_episodes_of_each_task():
    check_env(Backwards(ReachConfig()))  # nobody asked
    counts = r"67 % \(red-square 4/4, green-square 0/4, blue-square 4/4\)"
    with pytest.raises(ExtensionError, match=f"at least 70 %.*{counts}.*expert_action"):
        check_env(Backwards(ReachConfig()), expert=True, expert_episodes=4)
    with pytest.raises(ExtensionError, match=f"in each task.*{counts}"):  # enough in all, none of one
        check_env(Backwards(ReachConfig()), expert=True, expert_episodes=4, expert_success=0.5)
    with pytest.raises(ExtensionError, match="it succeeded in 0 %"):  # as it should, and no time for it
        check_env(ReachEnv(ReachConfig(max_steps=1)), expert=True)


class Pushing(ReachEnv):
    """Its expert lifts with nearly all its might, as one in millimetres would."""

    def expert_action(self) -> np.ndarray:
        action = super().expert_action()
        action[2] = 0.99 if self._steps % 2 else 1.0
        action[3] = 1.0  # always: a gripper that stays closed is no fault
        return action


def test_an_expert_at_its_limits_is_warned_of(caplog):
    check_env(Pushing(ReachConfig()), expert=True)
    [record] = caplog.records
    assert re.search(r"lies at its limit in dimension 2 \(mean 0\.99\d*, limits -1 and 1\);", record.getMessage())


def test_its_expert_succeeds_from_every_start_and_standing_still_never_does():
    env = ReachEnv(ReachConfig())
    for split in SPLITS:
        for index in range(env.num_starts(split)):
            for still in (False, True):
                env.reset(options={"start": Start(env.tasks[index % 3], split, index)})
                terminated = truncated = False
                while not (terminated or truncated):
                    action = np.zeros(4, np.float32) if still else env.expert_action()
                    _, reward, terminated, truncated, _ = env.step(action)
                assert terminated == (reward == 1.0) == (not still)


def test_success_in_the_last_decision_is_not_a_time_limit():
    start = Start("red-square", "train", 0)
    longer = ReachEnv(ReachConfig())
    longer.reset(options={"start": start})
    steps = 1
    while not longer.step(longer.expert_action())[2]:
        steps += 1
    for limit, ends in ((steps, (True, False)), (steps - 1, (False, True))):
        env = ReachEnv(ReachConfig(max_steps=limit))
        env.reset(options={"start": start})
        outcomes = [env.step(env.expert_action())[2:4] for _ in range(limit)]
        assert outcomes == [(False, False)] * (limit - 1) + [ends]


class Leaky(ReachEnv):
    """Keeps the gripper of the last episode."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        gripper = self._state[3]
        super().reset(seed=seed, options=options)
        self._state[3] = gripper
        return self._observe(), {}


class Random(ReachEnv):
    def step(self, action: np.ndarray):
        return super().step(action + np.random.default_rng().normal(0, 0.1, 4))


class Both(ReachEnv):
    """A time limit that is reported as both ends."""

    def step(self, action: np.ndarray):
        observation, _, terminated, truncated, info = super().step(action)
        return (
            observation,
            float(truncated or terminated),
            terminated or truncated,
            truncated,
            info | {"success": terminated or truncated},
        )


class Endless(ReachEnv):
    def step(self, action: np.ndarray):
        self._steps = 0
        return super().step(action)


class Unclipped(ReachEnv):
    def step(self, action: np.ndarray):
        if np.abs(action).max() > 1:
            self._state[0] += 0.01
        return super().step(action)


class OneBuffer(ReachEnv):
    """Returns the same array every time."""

    frame = np.zeros((24, 24, 3), np.uint8)

    def _observe(self):
        observation = super()._observe()
        self.frame[:] = observation["images"]["camera"]
        return observation | {"images": {"camera": self.frame}}


class SameStarts(ReachEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        start = start_option(options)
        check_start(self, start)
        return super().reset(options={"start": Start(start.task, "train", start.index)})


class TwoSplits(ReachEnv):
    """Takes whatever is no evaluation start for a training start."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        start = start_option(options)
        check_start(self, start)
        split = "eval" if start.split == "eval" else "train"
        return super().reset(options={"start": Start(start.task, split, start.index)})


class Float(ReachEnv):
    def _observe(self):
        observation = super()._observe()
        return observation | {"ee_state": observation["ee_state"].astype(np.float64)}


class Forgiving(ReachEnv):
    """Takes the nearest start there is."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        start = start_option(options)
        index = min(max(start.index, 0), self.num_starts(start.split) - 1)
        return super().reset(options={"start": Start(start.task, start.split, index)})


class SameWords(ReachEnv):
    def instruction(self, task: str) -> str:
        return "do it"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Leaky, "whatever was run before"),
        (Random, "whatever was run before"),
        (Both, "never both"),
        (Endless, "ends at a time limit"),
        (Unclipped, "clipped"),
        (OneBuffer, "copy it"),
        (SameStarts, "different first frames"),
        (TwoSplits, "validation.*different first frames"),
        (Float, r"ee_state is f32\[4\]"),
        (Forgiving, r"index=-1.* raises ValueError"),
        (SameWords, "share an instruction"),
    ],
)
def test_each_broken_promise_is_found(broken: type[ReachEnv], words: str):
    with pytest.raises(ExtensionError, match=words):
        check_env(broken(CONFIG))


def test_validation_on_training_starts_is_refused_before_it_is_measured():
    for kind, refused in ((ReachEnv, False), (TwoSplits, True)):
        env = kind(CONFIG)

        def reset(starts, following, env=env):
            return SimpleNamespace(frames=env.reset(options={"start": starts[0]})[0]["images"]["camera"][None])

        envs = SimpleNamespace(tasks=env.tasks, num_envs=1, reset=reset)
        with pytest.raises(ExtensionError, match="train start 0") if refused else nullcontext():
            check_validation(envs)
