"""Checks that environments which step together keep the contract of `reachrl.envs.batch.EnvBatch`, for plug-in authors.

from reachrl.testing.conformance_batch import check_batch
check_batch(MyWorlds(MyWorlds.Config(), 4))
"""

from collections.abc import Callable, Sequence

import numpy as np

from reachrl.envs.batch import EnvBatch
from reachrl.errors import ExtensionError
from reachrl.types import EnvStep, Observation, Start

_CHUNK = 3
_MAX_DECISIONS = 10_000  # an episode that lasts longer has no time limit


def check_batch(
    envs: EnvBatch, *, solve: Callable[[Start], np.ndarray] | None = None, low: float = -1.0, high: float = 1.0
) -> None:
    """Try environments out that step together.

    Args:
        envs: a fresh batch of two at least; it is not closed.
        solve: actions f32[T D] that solve the first training start of the first task, the last of them being the one
            that succeeds; None: whether a chunk stops at success is not checked.
        low: least number of the actions that are tried.
        high: greatest of them.

    Raises:
        ExtensionError: the first promise that is broken, and how to keep it.
    """
    _require(envs.num_envs >= 2, "the check needs two environments at least")
    starts = [Start(envs.tasks[n % len(envs.tasks)], "train", n) for n in range(envs.num_envs)]
    rng = np.random.default_rng(0)
    actions = rng.uniform(low, high, (envs.num_envs, 2 * _CHUNK, envs.action_dim)).astype(np.float32)
    _check_shapes(envs, starts)
    one_by_one = _play(envs, starts, np.split(actions, 2 * _CHUNK, axis=1))
    _check_chunks(envs, starts, actions, one_by_one)
    _check_replay(envs, starts, actions, one_by_one)
    _check_rows(envs, starts, actions, one_by_one)
    _check_time_limit(envs, starts)
    if solve is not None:
        _check_success(envs, solve)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ExtensionError(f"environments' contract: {message}")


def _check_shapes(envs: EnvBatch, starts: Sequence[Start]) -> None:
    seen = envs.reset(starts, starts)
    _require(list(seen.images) == list(envs.shown.cameras), "images are those of the cameras in `shown`, in its order")
    for camera, frames in seen.images.items():
        wanted = (envs.num_envs, *envs.shown.cameras[camera])
        _require(frames.dtype == np.uint8 and frames.shape == wanted, f"images[{camera!r}] is u8{list(wanted)}")
    size = envs.shown.state_size
    there = None if seen.state is None else seen.state.shape
    _require(there == (None if size is None else (envs.num_envs, size)), "state is f32[N S], or None without `shown`'s")
    wanted = tuple(envs.instruction(start.task) for start in starts)
    _require(seen.instructions == wanted, "an observation's instructions are those of the tasks that were begun")


def _play(envs: EnvBatch, starts: Sequence[Start], chunks: Sequence[np.ndarray]) -> list[EnvStep]:
    envs.reset(starts, starts)
    return [envs.step(chunk, starts) for chunk in chunks]


def _ended(step: EnvStep) -> np.ndarray:
    return step.terminated | step.truncated


def _check_chunks(envs: EnvBatch, starts: Sequence[Start], actions: np.ndarray, one_by_one: Sequence[EnvStep]) -> None:
    """A chunk is its actions one after the other."""
    whole = np.array([not any(_ended(step)[n] for step in one_by_one) for n in range(envs.num_envs)])
    _require(bool(whole.any()), f"an episode lasts longer than {2 * _CHUNK} random control steps")
    chunks = _play(envs, starts, np.split(actions, 2, axis=1))
    for number, step in enumerate(chunks):
        last = one_by_one[_CHUNK * (number + 1) - 1]
        _require(
            bool((step.executed[whole] == _CHUNK).all()),
            "`executed` counts the actions of a chunk that were carried out",
        )
        _same(step.observation, last.observation, whole, "a chunk leads where its actions lead one by one")
        same = np.allclose(step.ee_state[whole], last.ee_state[whole])
        _require(same, "`ee_state` is that after a chunk's last action")


def _check_replay(envs: EnvBatch, starts: Sequence[Start], actions: np.ndarray, one_by_one: Sequence[EnvStep]) -> None:
    lengths = [0 if any(_ended(step)[n] for step in one_by_one) else 1 + n % 3 for n in range(envs.num_envs)]
    seen = envs.replay(starts, [actions[n, :length] for n, length in enumerate(lengths)])
    for n, length in enumerate(lengths):
        if length:
            row = np.arange(envs.num_envs) == n
            _same(seen, one_by_one[length - 1].observation, row, "replay leads where the same actions led before")


def _check_rows(envs: EnvBatch, starts: Sequence[Start], actions: np.ndarray, one_by_one: Sequence[EnvStep]) -> None:
    """An episode does not depend on the row it is played in."""
    turned = [*starts[1:], starts[0]]
    steps = _play(envs, turned, np.split(np.roll(actions, -1, axis=0), 2 * _CHUNK, axis=1))
    for step, expected in zip(steps, one_by_one, strict=True):
        moved = expected.observation.rows(np.roll(np.arange(envs.num_envs), -1))
        row = ~np.roll(_ended(expected), -1)
        _same(step.observation, moved, row, "an episode depends neither on its row nor on the rows beside it")


def _check_time_limit(envs: EnvBatch, starts: Sequence[Start]) -> None:
    envs.reset(starts, starts)
    still = np.zeros((envs.num_envs, 1, envs.action_dim), np.float32)
    total = np.zeros(envs.num_envs, np.int64)
    running = np.ones(envs.num_envs, bool)
    for _ in range(_MAX_DECISIONS):
        step = envs.step(still, starts)
        total += step.executed * running
        _require(not (step.terminated & step.truncated).any(), "an episode is terminated or truncated, never both")
        _require(bool((step.success == step.terminated).all()), "an episode is terminated by success alone")
        running &= ~_ended(step)
        if not running.any():
            break
    _require(not running.any(), "an episode ends at `max_steps` control steps at the latest")
    envs.reset(starts, starts)
    chunk = np.zeros((envs.num_envs, int(total.max()) + _CHUNK, envs.action_dim), np.float32)
    step = envs.step(chunk, starts)
    _require(bool((step.executed == total).all()), "a chunk stops at the time limit, counted in control steps")


def _check_success(envs: EnvBatch, solve: Callable[[Start], np.ndarray]) -> None:
    start, other = Start(envs.tasks[0], "train", 0), Start(envs.tasks[0], "train", 1)
    solution = np.asarray(solve(start), np.float32)
    more = np.concatenate([solution, np.repeat(solution[-1:], _CHUNK, axis=0)])
    envs.reset([start] * envs.num_envs, [other] * envs.num_envs)
    step = envs.step(np.stack([more] * envs.num_envs), [other] * envs.num_envs)
    _require(bool(step.success.all()), "the actions of `solve` solve the start")
    _require(
        bool((step.executed == len(solution)).all()),
        f"a chunk stops at success: {len(solution)} actions were enough, {step.executed.tolist()} were carried out",
    )
    fresh = envs.reset([other] * envs.num_envs, [other] * envs.num_envs)
    every = np.ones(envs.num_envs, bool)
    _same(step.observation, fresh, every, "a row that ended shows the first frame of its next start")
    envs.reset([start] * envs.num_envs, [other] * envs.num_envs)
    first = np.arange(envs.num_envs) == 0  # the others stand still and go on
    alone = envs.step(np.where(first[:, None, None], more, 0).astype(np.float32), [other] * envs.num_envs)
    message = "an episode that has ended stays as it ended while other rows go on"
    _same(alone.final_observation, step.final_observation, first, message)


def _same(ours: Observation, theirs: Observation, rows: np.ndarray, message: str) -> None:
    for camera, frames in ours.images.items():
        _require(np.array_equal(frames[rows], theirs.images[camera][rows]), message)
    if ours.state is not None and theirs.state is not None:
        _require(np.array_equal(ours.state[rows], theirs.state[rows]), message)
