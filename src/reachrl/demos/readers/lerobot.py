"""LeRobot datasets of version 2.0, 2.1 and 3: one trajectory an episode, frames out of videos or Parquet files."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, UInt8

from reachrl.demos.checks import check_finite
from reachrl.demos.damage import unreadable
from reachrl.demos.readers.end_effector import StateColumns, end_effector, flat_names, named_columns
from reachrl.demos.readers.frames import check_size, decode_picture, slug
from reachrl.demos.readers.lerobot_columns import scalars, times_of, values, vectors, whole_numbers
from reachrl.demos.readers.lerobot_index import INFO, EpisodeRecord, LeRobotIndex, read_index
from reachrl.demos.readers.video import TOLERANCE_S, frames_at
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

    A row's frame is the one that the video shows at the row's `timestamp`, counted from where `meta` says that the
    episode begins. Where rows lie is found by their `episode_index`, in whatever file.

    Args:
        folder: the dataset's root, with `meta/info.json`.
        instruction: the sentence to use in place of the stored ones.
        camera: an image or video feature; None: the first that is no depth map.
        state: where the end effector is; None: found by the names of the columns.

    Raises:
        StorageError: a file is missing, damaged or shorter than `meta` says, `meta`, the rows and the videos contradict
            one another, or a number is not finite; names the episode and the row.
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
        needed = ["episode_index", "frame_index", "timestamp", self.action, self.state, *image]
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
    files = _files(index, records)
    read: set[int] = set()
    for path in dict.fromkeys(files.values()):
        for number, table in _tables(path, index, columns):
            record = records.get(number)
            if record is None:
                continue  # meta/ decides what belongs to the dataset
            if number in read:
                raise StorageError(f"{path}: the rows of episode {number} do not lie together. Fetch it again.")
            read.add(number)
            yield _trajectory(index, record, path, table, instruction, columns)
        lacking = [number for number, file in files.items() if file == path and number not in read]
        if lacking:
            raise StorageError(f"{path}: episode {lacking[0]} is not in this file. Fetch it again.")


def _files(index: LeRobotIndex, records: Mapping[int, EpisodeRecord]) -> dict[int, Path]:
    """The file with the rows of each episode, in reading order.

    In version 3 the files themselves are asked, as LeRobot does: public datasets have `data/file_index` pointers that
    their own conversion left behind.
    """
    if not index.many_in_a_file:
        return {number: record.data for number, record in records.items()}
    files: dict[int, Path] = {}
    for path in sorted((index.folder / "data").glob("*/*.parquet")):
        for number in _numbers_in(path):
            if number in records and files.setdefault(number, path) != path:
                raise StorageError(
                    f"{path}: episode {number} lies in {files[number]} too. Fetch the data folder again."
                )
    for number, record in records.items():
        if number not in files and not record.data.exists():
            raise StorageError(f"{record.data}: missing, and no other file holds episode {number}. Fetch it again.")
        if number not in files:
            raise StorageError(f"{record.data}: episode {number} is not in this file, nor in another. Fetch it again.")
    return files


def _numbers_in(path: Path) -> list[int]:
    """The numbers of the episodes in a file."""
    with _readable(path), pq.ParquetFile(path) as file:
        if "episode_index" not in file.schema_arrow.names:
            raise StorageError(f"{path}: no column 'episode_index', found {', '.join(file.schema_arrow.names)}.")
        return sorted(set(whole_numbers(file.read(columns=["episode_index"]), "episode_index", str(path)).tolist()))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn pyarrow's exceptions into errors that say what is wrong with the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error, remedy="Fetch this file again.") from error


def _tables(path: Path, index: LeRobotIndex, columns: _Columns) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each episode of a file, which lie together; one pass, however long its row groups are."""
    with _readable(path), pq.ParquetFile(path) as file:
        names = columns.names(index, file.schema_arrow.names)
        if missing := [name for name in names if name not in file.schema_arrow.names]:
            raise StorageError(
                f"{path}: no column {missing[0]!r}, found {', '.join(file.schema_arrow.names)}. Fetch it again."
            )
        current, parts = -1, []
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
            numbers = whole_numbers(pa.Table.from_batches([batch]), "episode_index", str(path))
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


def _trajectory(
    index: LeRobotIndex, record: EpisodeRecord, path: Path, table: pa.Table, instruction: str | None, columns: _Columns
) -> Trajectory:
    where = f"{index.folder}, episode {record.index}"
    if len(table) != record.length:
        raise StorageError(
            f"{path}: {len(table)} rows of episode {record.index}, {record.length} expected. Fetch it again."
        )
    sentence = instruction or _sentence(index, record, table)
    actions = vectors(table, columns.action, where)[:-1]
    ee_state = end_effector(vectors(table, columns.state, where), columns.numbers, columns.gripper_range, where=where)
    check_finite(actions, "action", where)
    check_finite(ee_state, "ee_state (x, y, z, gripper)", where)
    times = times_of(table, where)
    frames = _pictures(index, path, record.index, table) if record.video is None else _frames(record, times, where)
    return Trajectory(
        start=Start(slug(sentence), "train", record.index),
        instruction=sentence,
        actions=actions,
        images={index.camera: frames},
        ee_state=ee_state,
        success=_success(table, where),
        control_hz=index.fps,
        source="lerobot",
    )


def _success(table: pa.Table, where: str) -> bool:
    if _SUCCESS not in table.column_names:
        return True
    reached = scalars(table, _SUCCESS, where)
    if not np.isfinite(reached).all():
        raise StorageError(f"{where}: {_SUCCESS} is missing in row {int(np.argmin(np.isfinite(reached)))}.")
    return bool(reached.any())


def _sentence(index: LeRobotIndex, record: EpisodeRecord, table: pa.Table) -> str:
    """The instruction in the episode's rows, else that of `meta`."""
    where = f"{index.folder}, episode {record.index}"
    numbers = whole_numbers(table, "task_index", where).tolist() if "task_index" in table.column_names else []
    known = {index.tasks[number] for number in numbers if number in index.tasks}
    if known and (unknown := sorted(set(numbers) - index.tasks.keys())):
        raise StorageError(
            f"{where}: its rows bear task_index {unknown[0]}, which meta/tasks does not list. Fetch the meta folder "
            "again, or give an instruction."
        )
    sentences = known or set(record.tasks)
    if len(sentences) > 1:
        listed = "; ".join(sorted(sentences))
        raise ConfigError(f"{where}: several sentences ({listed}). Give an instruction that holds for all of it.")
    if not any(sentences):
        raise ConfigError(
            f"{where}: no sentence for task_index {numbers[0] if numbers else None} in meta/tasks. "
            "Give an instruction, or fetch the meta folder again."
        )
    return sentences.pop()


def _frames(record: EpisodeRecord, times: Float64[np.ndarray, "T"], where: str) -> UInt8[np.ndarray, "T H W 3"]:
    """The frame of each row out of the video."""
    assert record.video is not None
    wanted = record.video_start + times
    if wanted[-1] > record.video_stop - TOLERANCE_S:
        row = int(np.argmax(wanted > record.video_stop - TOLERANCE_S))
        raise StorageError(
            f"{where}, row {row}: its frame belongs at {wanted[row]:.6f} s of {record.video}, but the episode's frames "
            f"end at {record.video_stop:g} s (meta/episodes). Fetch the dataset again."
        )
    return frames_at(record.video, wanted, where=where)


def _pictures(index: LeRobotIndex, path: Path, episode: int, table: pa.Table) -> UInt8[np.ndarray, "T H W 3"]:
    """The picture in each row."""
    frames: list[np.ndarray] = []
    for number, cell in enumerate(values(table, index.camera)):
        where = f"{path}, episode {episode}, frame {number}"
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise StorageError(f"{where}: {index.camera} holds no picture; expected its bytes in the Parquet file.")
        try:
            frames.append(decode_picture(cell["bytes"]))
        except (OSError, SyntaxError, ValueError) as error:
            raise StorageError(f"{where}: damaged picture ({error}). Fetch this file again.") from error
        if frames[0].shape != frames[-1].shape:
            raise StorageError(f"{where}: {frames[-1].shape} after {frames[0].shape}; expected frames of one size.")
        height, width, _ = frames[0].shape
        check_size(len(frames), height, width, where)
    return np.stack(frames)
