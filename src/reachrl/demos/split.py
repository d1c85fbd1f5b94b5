"""Which start states are held out of training: whole starts of every task, never single steps."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from reachrl.fitting import hold_out
from reachrl.streams import Stream, generator
from reachrl.types import Start


def heldout_trajectories(starts: Sequence[Start], *, fraction: float, seed: int) -> Bool[np.ndarray, "E"]:
    """Choose about `fraction` of each task's start states; all trajectories of a start go the same way.

    The choice depends on the seed, the task and the set of its starts only, not on their order. A task with a
    single start is never held out, and with `fraction > 0` every other task holds out at least one.

    Args:
        starts: the start of each of E trajectories.
        fraction: share of the starts of each task, 0 <= fraction < 1.
        seed: the run's seed.

    Returns:
        True where a trajectory is held out.
    """
    tasks = sorted({start.task for start in starts})
    strata = [(task, sorted({start for start in starts if start.task == task})) for task in tasks]
    chosen = hold_out(
        ((unique, generator(seed, Stream.DEMO_SPLIT, task, len(unique))) for task, unique in strata), fraction
    )
    return np.array([start in chosen for start in starts], np.bool_)
