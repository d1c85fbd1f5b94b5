"""Columns of a LeRobot table as arrays, refused where they are not what the format says."""

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float64, Int64

from reachrl.errors import StorageError

_AGREEMENT_S = 1e-3  # float32 seconds of a long episode


def times_of(table: pa.Table, where: str) -> Float64[np.ndarray, "T"]:
    """Seconds from the episode's beginning to each row.

    Rows may have been left out, and numbered anew or not; what they say of themselves must agree.

    Raises:
        StorageError: `timestamp` and `frame_index` do not grow, or contradict each other.
    """
    numbers, times = whole_numbers(table, "frame_index", where), scalars(table, "timestamp", where)
    if not np.isfinite(times).all() or times[0] < 0 or np.any(np.diff(times) <= 0) or np.any(np.diff(numbers) <= 0):
        raise StorageError(
            f"{where}: `timestamp` and `frame_index` must grow from row to row, found {_some(times)} and "
            f"{_some(numbers)}. Fetch the data again, or write them anew."
        )
    rate = times[-1] / numbers[-1] if numbers[-1] else 0.0
    if np.abs(times - numbers * rate).max() > _AGREEMENT_S:
        raise StorageError(
            f"{where}: `timestamp` ({_some(times)} s) and `frame_index` ({_some(numbers)}) contradict each other; "
            "expected times in proportion to the numbers. Fetch the data again, or write them anew."
        )
    return times


def _some(values: np.ndarray) -> str:
    """The first values, for a message."""
    return ", ".join(f"{x:g}" for x in values[:6]) + (", ..." if len(values) > 6 else "")


def values(table: pa.Table, name: str) -> list[Any]:
    """A column as Python objects."""
    return table[name].to_pylist()


def scalars(table: pa.Table, name: str, where: str) -> Float64[np.ndarray, "T"]:
    """A column of numbers, or of vectors of one number; what is missing is NaN.

    Raises:
        StorageError: there are several numbers a row.
    """
    column = vectors(table, name, where, np.float64)
    if column.shape[1:] != (1,):
        raise StorageError(f"{where}: {name} holds {column.shape[1]} numbers a row, expected one. Fetch it again.")
    return column[:, 0]


def whole_numbers(table: pa.Table, name: str, where: str) -> Int64[np.ndarray, "T"]:
    """A column of whole numbers, none missing.

    Raises:
        StorageError: one is missing, or no whole number.
    """
    values = scalars(table, name, where)
    if not np.isfinite(values).all() or np.any(values != np.rint(values)):
        raise StorageError(f"{where}: {name} holds {_some(values)}; expected whole numbers. Fetch it again.")
    return values.astype(np.int64)


def vectors(table: pa.Table, name: str, where: str, kind: type[np.floating] = np.float32) -> Float[np.ndarray, "T D"]:
    """A column of vectors; a single number a row is a vector of one.

    Raises:
        StorageError: a row has none, or one of another length.
    """
    try:
        vectors = np.array(values(table, name), kind)
    except (ValueError, TypeError) as error:
        raise StorageError(f"{where}: {name} holds vectors of different lengths or none ({error}).") from error
    return vectors.reshape(len(vectors), -1)
