"""Which rows and frames of a rollout belong to which episode."""

import numpy as np
from jaxtyping import Bool, Int64

from reachrl.types import Rollout


def frame_numbers(rollout: Rollout) -> tuple[Int64[np.ndarray, "T N"], Int64[np.ndarray, "T N"]]:
    """Number a rollout's frames and say which one each step saw and which one it led to.

    Frames are numbered through `images` row by row, then `last_observation`, then `final_observation`. A step that
    ended an episode led to that episode's final frame, not to the next one's first.

    Returns:
        (seen, led to), both [T N].
    """
    num_steps, num_envs = rollout.valid.shape
    now = np.arange(num_steps * num_envs, dtype=np.int64).reshape(num_steps, num_envs)
    after = now + num_envs
    ended: Bool[np.ndarray, "T N"] = np.zeros((num_steps, num_envs), dtype=bool)
    if len(rollout.final_rows):
        t, n = rollout.final_rows.T
        after[t, n] = (num_steps + 1) * num_envs + np.arange(len(rollout.final_rows))
        ended[t, n] = True
    lost = (rollout.terminated | rollout.truncated) & rollout.valid & ~ended
    assert not lost.any(), f"no final frame for the episodes that ended at (t, n) = {np.argwhere(lost).tolist()}"
    return now, after


def first_rows(rollout: Rollout) -> Int64[np.ndarray, "T+1 N"]:
    """The row at which the episode that row `t` belongs to began, 0 where it began before the rollout.

    Row `T` is the last observation. A lost worker's row is followed by a new episode.
    """
    num_steps, num_envs = rollout.valid.shape
    over = rollout.terminated | rollout.truncated | ~rollout.valid
    begins = np.where(over, np.arange(1, num_steps + 1)[:, None], 0)
    return np.maximum.accumulate(np.concatenate([np.zeros((1, num_envs), np.int64), begins]), axis=0)


def episode_parts(rollout: Rollout) -> list[tuple[int, int, int]]:
    """(first row, last row, environment) of each stretch of valid steps of one episode in the rollout."""
    starts = first_rows(rollout)[:-1]
    parts: list[tuple[int, int, int]] = []
    for n in range(rollout.valid.shape[1]):
        for first in np.unique(starts[:, n]).tolist():
            rows = np.flatnonzero((starts[:, n] == first) & rollout.valid[:, n])
            if len(rows):
                parts.append((int(rows[0]), int(rows[-1]), n))
    return parts


def whole_episodes(rollout: Rollout) -> list[tuple[int, int, int, int]]:
    """(place in `final_rows`, first row, last row, environment) of the episodes that began and ended in the rollout."""
    starts = first_rows(rollout)
    ended = enumerate(zip(rollout.final_rows.tolist(), rollout.episodes, strict=True))
    spans = [(place, int(starts[t, n]), t, n, episode.num_decisions) for place, ((t, n), episode) in ended]
    return [(place, first, t, n) for place, first, t, n, decisions in spans if t + 1 - first == decisions]
