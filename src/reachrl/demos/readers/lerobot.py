"""LeRobot datasets of version 2.0, 2.1 and 3: one trajectory an episode, frames out of videos or Parquet files."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, UInt8

from reachrl.demos.readers.end_effector import StateColumns, end_effector, flat_names, named_columns
from reachrl.demos.readers.frames import check_size, slug, video_frames
from reachrl.demos.readers.lerobot_index import INFO, EpisodeRecord, LeRobotIndex, read_index
from reachrl.demos.shard import decode_frame
from reachrl.errors import ConfigError, StorageError
from reachrl.types import Start, Trajectory

_BATCH_ROWS = 256
_SUCCESS = "next.success"


def read_lerobot(
    folder: Path, *, instruction: str | None = None, camera: str | None = None, state: StateColumns | None = None
) -> Iterator[Trajectory]:
    """Read the episodes of a LeRobot dataset in order, one in memory at a time.

    An episode stores as many frames as actions; all T frames are used and the first T - 1 actions. It counts as a
    success where `next.success` is true once, or where that column is absent.

    Args:
        folder: the dataset's root, with `meta/info.json`.
        instruction: the sentence to use in place of the stored ones.
        camera: an image or video feature; None: the first that is no depth map.
        state: where the end effector is; None: found by the names of the columns.

    Raises:
        StorageError: a file is missing, damaged or shorter than `meta` says.
        ConfigError: the version, the camera or the meaning of the state is unknown; names what there is.
    """
    index = read_index(folder, camera=camera)
    feature, columns = _state_columns(index, state or StateColumns())
    action = next((key for key in ("action", "actions") if key in index.features), None)
    if action is None:
        raise ConfigError(f"{folder / INFO}: no feature `action` or `actions`. There are: {', '.join(index.features)}.")
    return _episodes(index, instruction, _Columns(action, feature, columns, (state or StateColumns()).gripper_range))


class _Columns:
    """Which Parquet columns hold what."""

    def __init__(
        self, action: str, state: str, numbers: Sequence[int], gripper_range: tuple[float, float] | None
    ) -> None:
        self.action, self.state, self.numbers, self.gripper_range = action, state, numbers, gripper_range

    def names(self, index: LeRobotIndex, available: Sequence[str]) -> list[str]:
        """The columns to read from a file, optional ones only where they are there."""
        image = [index.camera] if index.features[index.camera]["dtype"] == "image" else []
        needed = ["episode_index", self.action, self.state, *image]
        return [*needed, *(name for name in ("task_index", _SUCCESS) if name in available)]


def _state_columns(index: LeRobotIndex, state: StateColumns) -> tuple[str, Sequence[int]]:
    """The state's feature and the positions of x, y, z and gripper in it."""
    vectors = [key for key, value in index.features.items() if "float" in str(value.get("dtype"))]
    feature = state.feature or next((key for key in ("observation.state", "state") if key in vectors), None)
    if feature not in vectors:
        what = f"no state {state.feature!r}" if state.feature else "no observation.state or state"
        raise ConfigError(
            f"{index.folder / INFO}: {what} among the features. Name the one that holds the end effector "
            f"(`StateColumns.feature`, --state); there are: {', '.join(vectors) or 'none'}."
        )
    if state.columns is not None:
        return feature, state.columns
    names = flat_names(index.features[feature].get("names"))
    found = named_columns(names)
    if found is None:
        raise ConfigError(
            f"{index.folder / INFO}: the meaning of {feature} {index.features[feature].get('shape')} is unknown: its "
            f"names are {names or 'not given'}, expected x, y, z and gripper among them. Say which numbers are x, y, z "
            "and gripper (`StateColumns.columns`, --columns): 0,1,2,6,7 for position, axis angle and two fingers."
        )
    return feature, found


def _episodes(index: LeRobotIndex, instruction: str | None, columns: _Columns) -> Iterator[Trajectory]:
    records = {record.index: record for record in index.episodes}
    read: set[int] = set()
    for path in dict.fromkeys(record.data for record in index.episodes):
        for number, table in _tables(path, index, columns):
            record = records.get(number)
            if record is None or number in read:
                continue  # meta/ decides what belongs to the dataset
            read.add(number)
            yield _trajectory(index, record, table, instruction, columns)
        lacking = [record.index for record in index.episodes if record.data == path and record.index not in read]
        if lacking:
            raise StorageError(f"{path}: episode {lacking[0]} is not in this file. Fetch it again.")


def _tables(path: Path, index: LeRobotIndex, columns: _Columns) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each episode of a file, which lie together; one pass, however long its row groups are."""
    try:
        with pq.ParquetFile(path) as file:
            names = columns.names(index, file.schema_arrow.names)
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                raise StorageError(
                    f"{path}: no column {missing[0]!r}, found {', '.join(file.schema_arrow.names)}. Fetch it again."
                )
            current, parts = -1, []
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                numbers = batch.column("episode_index").to_numpy(zero_copy_only=False)
                edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
                for first, last in itertools.pairwise(edges):
                    if first == last:
                        continue
                    if parts and numbers[first] != current:
                        yield current, pa.Table.from_batches(parts)
                        parts = []
                    current = int(numbers[first])
                    parts.append(batch.slice(first, last - first))
            if parts:
                yield current, pa.Table.from_batches(parts)
    except (pa.ArrowException, OSError) as error:
        state = "missing" if isinstance(error, FileNotFoundError) else f"truncated or damaged ({error})"
        raise StorageError(f"{path}: {state}. Fetch this file again.") from error


def _trajectory(
    index: LeRobotIndex, record: EpisodeRecord, table: pa.Table, instruction: str | None, columns: _Columns
) -> Trajectory:
    where = f"{index.folder}, episode {record.index}"
    if len(table) != record.length:
        raise StorageError(
            f"{record.data}: {len(table)} rows of episode {record.index}, {record.length} expected. Fetch it again."
        )
    sentence = instruction or _sentence(index, record, table)
    state = _vectors(table, columns.state, where)
    return Trajectory(
        start=Start(slug(sentence), "train", record.index),
        instruction=sentence,
        actions=_vectors(table, columns.action, where)[:-1],
        images=_frames(index, record, table),
        ee_state=end_effector(state, columns.numbers, columns.gripper_range, where=where),
        success=_SUCCESS not in table.column_names or bool(np.any(_values(table, _SUCCESS))),
        source="lerobot",
    )


def _values(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist()


def _vectors(table: pa.Table, name: str, where: str) -> Float32[np.ndarray, "T D"]:
    """A column of vectors; a single number a row is a vector of one."""
    try:
        vectors = np.array(_values(table, name), np.float32)
    except (ValueError, TypeError) as error:
        raise StorageError(f"{where}: {name} holds vectors of different lengths or none ({error}).") from error
    return vectors.reshape(len(vectors), -1)


def _sentence(index: LeRobotIndex, record: EpisodeRecord, table: pa.Table) -> str:
    """What the episode's first row says is to be done, else what `meta` says."""
    number = _values(table, "task_index")[0] if "task_index" in table.column_names else None
    number = number[0] if isinstance(number, list) else number
    sentence = index.tasks.get(number, "") if number is not None else ""
    sentence = sentence or next(iter(record.tasks), "")
    if not sentence:
        raise ConfigError(
            f"{index.folder}, episode {record.index}: no sentence for task_index {number} in meta/tasks. "
            "Give an instruction, or fetch the meta folder again."
        )
    return sentence


def _frames(index: LeRobotIndex, record: EpisodeRecord, table: pa.Table) -> UInt8[np.ndarray, "T H W 3"]:
    if record.video is not None:
        return video_frames(record.video, start=record.video_start, count=record.length, fps=index.fps)
    frames: list[np.ndarray] = []
    for number, cell in enumerate(_values(table, index.camera)):
        where = f"{record.data}, episode {record.index}, frame {number}"
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise StorageError(f"{where}: {index.camera} holds no picture; expected its bytes in the Parquet file.")
        try:
            frames.append(decode_frame(cell["bytes"]))
        except (OSError, SyntaxError, ValueError) as error:
            raise StorageError(f"{where}: damaged picture ({error}). Fetch this file again.") from error
        if frames[0].shape != frames[-1].shape:
            raise StorageError(f"{where}: {frames[-1].shape} after {frames[0].shape}; expected frames of one size.")
        height, width, _ = frames[0].shape
        check_size(len(frames), height, width, where)
    return np.stack(frames)
