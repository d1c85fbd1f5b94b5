"""Checks of episodes: finite numbers, rows that form one whole episode."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from reachrl.errors import StorageError


def check_finite(values: Float[np.ndarray, "T D"], what: str, where: str, *, first_step: int = 0) -> None:
    """Refuse an episode in which a number is not finite.

    One such number would turn the statistics of its dimension into NaN, and a NaN becomes a valid token without a
    word.

    Args:
        values: one row per step.
        what: the row's name in the message, such as `action`.
        where: the file and the episode.
        first_step: the number of the first row, as the file counts.

    Raises:
        StorageError: names the first step and dimension.
    """
    if np.isfinite(values).all():
        return
    step, dimension = np.argwhere(~np.isfinite(values))[0].tolist()
    raise StorageError(
        f"{where}, step {first_step + step}: {what} is {values[step, dimension]} in dimension {dimension}; expected "
        "finite numbers. Fix this episode at its source, or leave it out."
    )


def check_trajectory(actions: np.ndarray, ee_state: np.ndarray, where: str) -> None:
    """`check_finite` of an episode's actions f32[T D] and end-effector states f32[T+1 4].

    Poses that are NaN throughout say that none were recorded, as in a video.

    Raises:
        StorageError: names the first step and dimension.
    """
    check_finite(actions, "action", where)
    if not np.isnan(ee_state).all():
        check_finite(ee_state, "ee_state (x, y, z, gripper)", where)


def check_rows(table: pa.Table, where: str) -> None:
    """Refuse rows that were filtered, sorted or joined since they were written: action t belongs to frame t.

    Raises:
        StorageError: `step` does not count from 0, or `is_final` marks another row than the last.
    """
    steps, final = table["step"].to_pylist(), table["is_final"].to_pylist()
    if steps != list(range(len(table))) or final != [False] * (len(table) - 1) + [True]:
        raise StorageError(
            f"{where}: {len(table)} rows that are not one whole episode (step {', '.join(map(str, steps[:6]))}, ...; "
            f"{sum(map(bool, final))} marked is_final). A row group holds exactly one, whole and in order: write it "
            "with reachrl.demos.store.write_shard."
        )
