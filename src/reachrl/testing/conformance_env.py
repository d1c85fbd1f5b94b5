"""Checks that an environment keeps the contract of `reachrl.envs.base.Env`, for plug-in authors.

from reachrl.testing.conformance_env import check_env
check_env(MyEnv(MyEnv.Config()))
"""

import logging
from itertools import product
from typing import Any

import numpy as np

from reachrl.envs.base import Env, Shown
from reachrl.errors import ExtensionError
from reachrl.functional.action_stats import at_limits
from reachrl.types import SPLITS, Start

log = logging.getLogger(__name__)

_MAX_DECISIONS = 10_000  # an episode that lasts longer has no time limit


def check_env(
    env: Env,
    *,
    num_steps: int = 5,
    expert: bool | None = None,
    expert_episodes: int = 5,
    expert_success: float = 0.7,
) -> None:
    """Try an environment out.

    Where the expert's mean action lies at a limit of `action_space`, a warning is logged: its units may be wrong.

    Args:
        env: a fresh instance; it is not closed.
        num_steps: decisions compared in the determinism check.
        expert: True: the expert must solve its tasks in whole episodes; None: only its first action is looked at, if
            `expert_action` does not raise `NotImplementedError`; False: nothing is asked of it.
        expert_episodes: episodes of each of the first three tasks that the expert plays, on training starts.
        expert_success: share of them that must succeed; of each task at least one.

    Raises:
        ExtensionError: the first promise that is broken, and how to keep it.
    """
    _check_description(env)
    starts = [Start(task, split, 0) for task, split in product(env.tasks[:3], SPLITS)]
    _check_refusals(env)
    for start in starts:
        _check_observation(env, start)
    _check_frames_differ(env)
    _check_determinism(env, starts, num_steps)
    _check_ends(env, starts[0])
    if expert is not False:
        _check_expert(env, starts[0], expert)
    if expert:
        _check_expert_succeeds(env, expert_episodes, expert_success)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ExtensionError(f"environment contract: {message}")


def _check_description(env: Env) -> None:
    _require(isinstance(env.tasks, tuple) and len(env.tasks) > 0, "`tasks` is a non-empty tuple of names")
    sentences = [env.instruction(task) for task in env.tasks]
    _require(all(isinstance(s, str) and s.strip() for s in sentences), "each task has an instruction")
    _require(len(set(sentences)) == len(sentences), f"two tasks share an instruction: {sentences}")
    for split in SPLITS:
        _require(env.num_starts(split) >= 1, f"there is at least one {split} start")
    space: Any = env.action_space
    _require(len(space.shape) == 1 and space.dtype == np.float32, "`action_space` is a Box f32[D]")
    _require(bool(np.isfinite([space.low, space.high]).all()), "`action_space` is bounded")
    _require(env.control_hz is None or env.control_hz > 0, "`control_hz` is actions a second, or None")
    Shown.of(env.observation_space)


def _check_refusals(env: Env) -> None:
    task = env.tasks[0]
    wrong = [None, {}, {"start": task}, {"start": Start("no such task", "train", 0)}]
    wrong += [{"start": Start(task, split, number)} for split in SPLITS for number in (-1, env.num_starts(split))]
    for options in wrong:
        try:
            env.reset(options=options)
        except ValueError:
            continue
        _require(False, f"reset(options={options!r}) raises ValueError; `start_option` and `check_start` do it")


def _reset(env: Env, start: Start) -> dict[str, Any]:
    observation, _ = env.reset(options={"start": start})
    return observation


def _check_observation(env: Env, start: Start) -> None:
    _check_dtypes(env, _reset(env, start), "reset")
    action = np.zeros(env.action_space.shape, np.float32)
    first, reward, terminated, truncated, info = env.step(action)
    _check_dtypes(env, first, "step")
    _require("success" in info, 'step returns info["success"]')
    progress = info.get("progress", 0.0)
    _require(0.0 <= progress <= 1.0, f'info["progress"], where there is one, lies in [0, 1]; got {progress}')
    _require(isinstance(terminated, bool) and isinstance(truncated, bool), "terminated and truncated are bools")
    _require(float(reward) == float(terminated) == float(info["success"]), "reward is 1 on success and 0 otherwise")
    kept = _pixels(first)
    if not (terminated or truncated):
        env.step(np.ones_like(action))
        _require(_pixels(first) == kept, "a returned frame is not overwritten by the next step: copy it")


def _check_dtypes(env: Env, observation: dict[str, Any], where: str) -> None:
    shown, ee_state = Shown.of(env.observation_space), observation["ee_state"]
    _require(set(observation.get("images", {})) == set(shown.cameras), f"{where}: images are those of the cameras")
    for camera, image in observation["images"].items():
        right = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        _require(right, f"{where}: images[{camera!r}] is u8[H W 3]")
    _require(ee_state.dtype == np.float32 and ee_state.shape == (4,), f"{where}: ee_state is f32[4]")
    _require(bool(np.isfinite(ee_state).all()) and 0 <= ee_state[3] <= 1, f"{where}: ee_state is finite, gripper 0..1")
    if shown.state_size is not None:
        state = observation["state"]
        _require(bool(np.isfinite(state).all()) and state.dtype == np.float32, f"{where}: state is f32[S] and finite")
    _require(env.observation_space.contains(observation), f"{where}: the observation lies in `observation_space`")


def _pixels(observation: dict[str, Any]) -> bytes:
    """The images of all cameras."""
    return b"".join(observation["images"][camera].tobytes() for camera in sorted(observation["images"]))


def _shown(observation: dict[str, Any]) -> bytes:
    """Everything an observation holds."""
    numbers = (observation[name].tobytes() for name in ("ee_state", "state") if name in observation)
    return _pixels(observation) + b"".join(numbers)


def _check_frames_differ(env: Env) -> None:
    """Every pair of tasks, of starts and of splits shows another first frame."""
    starts = [Start(task, "train", 0) for task in env.tasks]
    starts += [Start(env.tasks[0], "train", i) for i in range(1, min(5, env.num_starts("train")))]
    for split in ("validation", "eval"):
        starts += [Start(env.tasks[0], split, i) for i in range(min(5, env.num_starts(split)))]
    frames = {start: _pixels(_reset(env, start)) for start in starts}
    for i, start in enumerate(starts):
        for other in starts[:i]:
            _require(
                frames[start] != frames[other],
                f"{start} and {other} show different first frames; draw a start with `start_key(start)`, which tells "
                "tasks, splits and numbers apart",
            )


def _trace(env: Env, start: Start, actions: np.ndarray) -> list[bytes]:
    """Everything an episode shows, as bytes."""
    observation = _reset(env, start)
    seen = [_shown(observation)]
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        outcome = np.array([reward, terminated, truncated], np.float64)
        seen.append(_shown(observation) + outcome.tobytes())
        if terminated or truncated:
            break
    return seen


def _check_determinism(env: Env, starts: list[Start], num_steps: int) -> None:
    """The same start and actions show the same episode, whatever ran before: nothing leaks from the last one."""
    space: Any = env.action_space
    rng = np.random.default_rng(0)
    actions = rng.uniform(space.low, space.high, (num_steps, *space.shape)).astype(np.float32)
    first = {start: _trace(env, start, actions) for start in starts}
    moved = any(len(set(trace)) > 1 for trace in first.values())
    _require(moved, "actions change what is seen")
    for start in reversed(starts):
        _trace(env, starts[0], -actions)  # another episode in between
        again = _trace(env, start, actions)
        same = first[start] == again
        _require(same, f"{start} with the same actions shows the same episode whatever was run before")
    clipped = np.where(actions > 0, space.high, space.low)
    same = _trace(env, starts[0], clipped) == _trace(env, starts[0], clipped + np.sign(actions))
    _require(same, "actions beyond `action_space` are clipped to it")


def _check_ends(env: Env, start: Start) -> None:
    _reset(env, start)
    still = np.zeros(env.action_space.shape, np.float32)
    for _ in range(_MAX_DECISIONS):
        _, _, terminated, truncated, info = env.step(still)
        _require(not (terminated and truncated), "an episode is terminated or truncated, never both")
        _require(bool(info["success"]) == terminated, "terminated means success")
        if terminated or truncated:
            return
    _require(False, f"an episode ends at a time limit; this one goes on after {_MAX_DECISIONS} decisions")


def _check_expert(env: Env, start: Start, required: bool | None) -> None:
    _reset(env, start)
    try:
        action = env.expert_action()
    except NotImplementedError:
        _require(not required, "this environment promises an expert")
        return
    same = isinstance(action, np.ndarray) and action.dtype == np.float32 and action.shape == env.action_space.shape
    _require(same, "expert_action is f32[D]")
    _require(env.action_space.contains(action), "expert_action lies in `action_space`")


def _check_expert_succeeds(env: Env, episodes: int, threshold: float) -> None:
    """Whole episodes of the expert on training starts: what demonstrations would be made of."""
    wins, actions = dict[str, int](), list[np.ndarray]()
    played = min(episodes, env.num_starts("train"))
    for task in env.tasks[:3]:
        wins[task] = 0
        for number in range(played):
            _reset(env, Start(task, "train", number))
            terminated = truncated = False
            while not (terminated or truncated):
                actions.append(env.expert_action())
                _, _, terminated, truncated, _ = env.step(actions[-1])
            wins[task] += terminated
    counts = ", ".join(f"{task} {won}/{played}" for task, won in wins.items())
    rate = sum(wins.values()) / (played * len(wins))
    _require(
        rate >= threshold and min(wins.values()) > 0,
        f"the expert succeeds in at least {100 * threshold:.0f} % of its episodes and in each task; it succeeded in "
        f"{100 * rate:.0f} % ({counts}). Mend `expert_action`, raise `max_steps`, or call check_env(expert=False) and "
        "train without demonstrations",
    )
    space: Any = env.action_space
    taken = np.stack(actions)
    varied = taken.min(axis=0) < taken.max(axis=0)  # a gripper that stays closed is no fault
    if found := at_limits(taken, space.low, np.where(varied, space.high, space.low)):
        log.warning(
            "over %d decisions the expert's mean action lies at its limit in %s; are its actions in the units of "
            "`action_space`?", len(actions), found,
        )  # fmt: skip
