"""What every reward must satisfy, and a made-up rollout to try it on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter

import numpy as np
from jaxtyping import UInt8

from reachrl.errors import ExtensionError
from reachrl.rewards.base import Reward
from reachrl.rewards.episodes import episode_parts
from reachrl.types import Episode, Observation, Rewards, Rollout, Start


def one_camera(frames: UInt8[np.ndarray, "N H W 3"], instruction: str = "reach the goal") -> Observation:
    """Rows that one camera, `camera`, filmed."""
    return Observation(images={"camera": frames}, instructions=(instruction,) * len(frames))


def make_rollout(
    num_steps: int = 6,
    num_envs: int = 3,
    *,
    image_size: int = 32,
    seed: int = 0,
    instruction: str = "reach the goal",
    cameras: Sequence[str] = ("camera",),
    state_size: int | None = None,
) -> Rollout:
    """A rollout of random frames with terminated, truncated, running and lost rows.

    Args:
        num_steps: T.
        num_envs: N.
        image_size: side of the frames in pixels.
        seed: of frames and episode ends.
        instruction: of every row.
        cameras: names of the cameras, the first one first.
        state_size: S, the numbers of `rollout.state`, drawn from 0..1; None: the simulator has no state.
    """
    generator = np.random.default_rng(seed)
    shape = (num_steps, num_envs)
    draw = generator.random(shape)
    valid = generator.random(shape) > 0.1
    terminated, truncated = (draw < 0.2) & valid, (draw > 0.8) & valid
    rows = np.argwhere(terminated | truncated)
    start = Start("reach", "train", 0)
    size = (image_size, image_size, 3)

    def films(count: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {camera: generator.integers(0, 256, (*count, *size), dtype=np.uint8) for camera in cameras}

    def states(count: tuple[int, ...]) -> np.ndarray | None:
        return None if state_size is None else generator.random((*count, state_size)).astype(np.float32)

    def seen(count: int) -> Observation:
        return Observation(images=films((count,)), instructions=(instruction,) * count, state=states((count,)))

    return Rollout(
        images=films(shape),
        instructions=((instruction,) * num_envs,) * num_steps,
        state=states(shape),
        last_observation=seen(num_envs),
        final_observation=seen(len(rows)),
        final_rows=rows.reshape(-1, 2).astype(np.int64),
        token_ids=np.zeros((*shape, 4), dtype=np.int64),
        token_mask=np.ones((*shape, 4), dtype=bool),
        behaviour_logprobs=np.zeros((*shape, 4), dtype=np.float32),
        malformed=np.zeros(shape, dtype=bool),
        success=terminated.copy(),
        terminated=terminated,
        truncated=truncated,
        valid=valid,
        executed=valid.astype(np.int32),
        ee_state=generator.random((*shape, 4)).astype(np.float32),
        progress=generator.random((*shape, 2)).astype(np.float32),
        episodes=tuple(
            Episode(start=start, success=bool(terminated[t, n]), num_steps=1, num_decisions=1, env=int(n))
            for t, n in rows
        ),
        policy_version=0,
    )


def permute_envs(rollout: Rollout, order: np.ndarray) -> Rollout:
    """The same rollout with its environments in another order."""
    place = np.argsort(order)  # old env -> new env
    rows = np.stack([rollout.final_rows[:, 0], place[rollout.final_rows[:, 1]]], axis=1)
    by_row = np.lexsort((rows[:, 1], rows[:, 0]))
    return replace(
        rollout,
        **rollout.each_array(lambda array: array[:, order]),
        instructions=tuple(tuple(row[n] for n in order) for row in rollout.instructions),
        last_observation=rollout.last_observation.rows(order),
        final_observation=rollout.final_observation.rows(by_row),
        final_rows=rows[by_row],
    )


def check_reward(reward: Reward, rollout: Rollout | None = None) -> None:
    """Prove that a reward keeps its contract on `rollout` (by default a made-up one, with one camera and no state).

    A reward that looks at a camera by its name, or at `rollout.state`, is given
    `make_rollout(cameras=["front"], state_size=8)`.

    Raises:
        ExtensionError: which clause is broken.
    """
    made_up = rollout is None
    rollout = rollout or make_rollout()
    name = type(reward).__name__
    rewards = _scored(reward, rollout, made_up)
    parts = rewards.parts or {"total": rewards.total}
    for key, value in {"total": rewards.total, **parts}.items():
        if value.shape != rollout.valid.shape or value.dtype != np.float32:
            raise ExtensionError(
                f"{name}: `{key}` is {value.dtype}{list(value.shape)}, expected float32{list(rollout.valid.shape)}."
            )
        if not np.isfinite(value).all():
            raise ExtensionError(f"{name}: `{key}` is not finite at (t, n) = {np.argwhere(~np.isfinite(value))[0]}.")
        if value[~rollout.valid].any():
            raise ExtensionError(f"{name}: `{key}` rewards rows that are not valid; they must be 0.")
    if not np.allclose(sum(parts.values()), rewards.total, atol=1e-6):
        raise ExtensionError(f"{name}: the parts {sorted(parts)} do not sum to the total.")
    _check_order(reward, rollout, rewards)


def _scored(reward: Reward, rollout: Rollout, made_up: bool) -> Rewards:
    try:
        return reward(rollout)
    except (TypeError, KeyError, IndexError) as error:
        if not made_up:
            raise
        raise ExtensionError(
            f"{type(reward).__name__} raised {type(error).__name__}: {error}, on a made-up rollout with the camera "
            f"{', '.join(map(repr, rollout.images))} and no state. If it reads other cameras or `rollout.state`, "
            "check it on one that has them: rollout=make_rollout(cameras=['front'], state_size=8)."
        ) from error


def _check_order(reward: Reward, rollout: Rollout, rewards: Rewards) -> None:
    order = np.roll(np.arange(rollout.valid.shape[1]), 1)
    permuted = reward(permute_envs(rollout, order)).total
    if not np.allclose(permuted, rewards.total[:, order], atol=1e-5):
        raise ExtensionError(f"{type(reward).__name__}: a row's reward depends on the order of the environments.")


def cut_rollout(rollout: Rollout, borders: Sequence[int]) -> list[Rollout]:
    """The same steps as several rollouts in a row, as a collector with a smaller `num_steps` would bring them.

    Args:
        rollout: T steps.
        borders: ascending rows in 1..T-1 at which a new rollout begins.
    """
    parts: list[Rollout] = []
    for first, end in pairwise([0, *borders, len(rollout.valid)]):
        rows = slice(first, end)
        inside = (rollout.final_rows[:, 0] >= first) & (rollout.final_rows[:, 0] < end)
        last = rollout.last_observation
        if end < len(rollout.valid):
            num_envs = rollout.valid.shape[1]
            last = rollout.decisions().rows(slice(end * num_envs, (end + 1) * num_envs))
        parts.append(
            replace(
                rollout,
                **rollout.each_array(itemgetter(rows)),
                instructions=rollout.instructions[rows],
                last_observation=last,
                final_observation=rollout.final_observation.rows(np.flatnonzero(inside)),
                final_rows=rollout.final_rows[inside] - np.array([first, 0]),
                episodes=tuple(each for each, kept in zip(rollout.episodes, inside, strict=True) if kept),
            )
        )
    return parts


def check_borders(
    make: Callable[[], Reward], *, gamma: float, rollout: Rollout | None = None, tolerance: float = 1e-5
) -> None:
    """Prove that what an episode earns does not depend on where rollouts end, nor on a resume at a border.

    It holds for sparse rewards and for potentials: their discounted sum over an episode is a difference of the last
    and the first potential.

    Args:
        make: a new reward, with the same weights each time.
        gamma: the discount of the sum.
        rollout: by default a made-up one, with one camera and no state.
        tolerance: of the sums.

    Raises:
        ExtensionError: the border, the environment and the two sums.
    """
    made_up = rollout is None
    rollout = rollout or make_rollout(12, 4)
    name, num_steps = type(make()).__name__, len(rollout.valid)
    expected = _episode_sums(rollout, _scored(make(), rollout, made_up).total, gamma)
    cuts = [(border,) for border in range(1, num_steps)] + [tuple(range(1, num_steps))]
    for borders in cuts:
        totals, state = [], None
        for part in cut_rollout(rollout, borders):
            reward = make()
            if state is not None:
                reward.load_state_dict(state)
            totals.append(reward(part).total)
            state = json.loads(json.dumps(reward.state_dict()))
        found = _episode_sums(rollout, np.concatenate(totals), gamma)
        for where, earned in expected.items():
            if abs(found[where] - earned) > tolerance:
                raise ExtensionError(
                    f"{name}: with rollouts that end before the rows {list(borders)}, the episode that begins at "
                    f"(t, n) = {where} earns {found[where]:g}, without {earned:g}; carry over what the reward needs of "
                    "the rollout before, in its state too."
                )


def _episode_sums(rollout: Rollout, total: np.ndarray, gamma: float) -> dict[tuple[int, int], float]:
    """{(first row, environment): discounted sum of rewards} of each stretch of valid steps of one episode."""
    return {
        (first, n): float(gamma ** np.arange(last + 1 - first) @ total[first : last + 1, n].astype(np.float64))
        for first, last, n in episode_parts(rollout)
    }


class ShuffledReward(Reward):
    """Deals the rewards of ended episodes out again at random: what is left to learn from is nothing.

    A control for learning tests: the amounts and the times of reward stay as they are, only which episode
    gets which is random, so any gain that survives comes from something else than the reward.

    Args:
        reward: a reward that pays at episode ends only, such as the task's.
        seed: of the dealing; the rollout's policy version is mixed in.
    """

    def __init__(self, reward: Reward, *, seed: int) -> None:
        self.reward, self.seed = reward, seed

    def __call__(self, rollout: Rollout) -> Rewards:
        """The wrapped reward with its episode ends permuted."""
        total = self.reward(rollout).total.copy()
        ends = rollout.terminated | rollout.truncated
        if np.any(total[~ends]):
            raise ExtensionError("ShuffledReward needs a reward that pays at episode ends only")
        total[ends] = np.random.default_rng((self.seed, rollout.policy_version)).permutation(total[ends])
        return Rewards(total=total, parts={"shuffled": total})
