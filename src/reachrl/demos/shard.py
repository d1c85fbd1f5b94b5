"""One shard of a trajectory store: episodes as Parquet rows, frames as PNG, written aside and renamed.

One row is one frame:

    task, split, start_index   which numbered start state the episode began from
    instruction, source        the sentence shown; who acted ("expert", "policy", ...)
    episode_index              number of the episode within its shard
    step, is_final, success    position; the frame after the last action; whether the episode succeeded
    image.<camera>             {bytes: PNG, path: null}, the layout that Hugging Face `datasets` decodes; one for each
    action                     f32[D] in the environment's units, null on the final row
    ee_state                   f32[4], x y z in metres and gripper opening 0..1
    state                      f32[S], what else the robot knew of itself; absent where there was none
    control_hz                 actions a second; null where it is not known

Shards of format 1 hold one camera in a column `image` and neither `state` nor `control_hz`. A row group holds
exactly one episode, so reading needs memory for one. `pandas.read_parquet(shard)` and
`datasets.load_dataset("parquet", data_files="folder/*.parquet")` open it without this package.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, UInt8
from PIL import Image
from pyarrow.fs import LocalFileSystem

from reachrl.demos.checks import check_finite, check_rows, check_trajectory
from reachrl.demos.damage import unreadable
from reachrl.errors import ConfigError, StorageError
from reachrl.run.atomic import aside, recover, storage_errors
from reachrl.types import Start, Trajectory

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("task", pa.string()),
    ("split", pa.string()),
    ("start_index", pa.int32()),
    ("instruction", pa.string()),
    ("source", pa.string()),
    ("episode_index", pa.int32()),
    ("step", pa.int32()),
    ("is_final", pa.bool_()),
    ("success", pa.bool_()),
    ("action", pa.list_(pa.float32())),
    ("ee_state", pa.list_(pa.float32())),
]
_OLD_IMAGE = "image"  # the one camera of format 1, and its name since


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How Hugging Face `datasets` names a column's type."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    return {"dtype": "float32" if kind == pa.float32() else str(kind), "_type": "Value"}


def _schema(cameras: Iterable[str], *, with_state: bool) -> pa.Schema:
    """The columns of a shard whose frames come from `cameras`, in order."""
    columns = [(f"image.{camera}", _IMAGE) for camera in cameras] + _COLUMNS + [("control_hz", pa.float32())]
    if with_state:
        columns.append(("state", pa.list_(pa.float32())))
    features = {name: _feature(kind) for name, kind in columns}
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "reachrl_format": str(FORMAT_VERSION),
    }
    return pa.schema(columns, metadata=metadata)


def image_columns(schema: pa.Schema) -> dict[str, str]:
    """The column of each camera, in order."""
    names = [name for name in schema.names if name == _OLD_IMAGE or name.startswith("image.")]
    return {name.removeprefix("image."): name for name in names}


def encode_frame(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Compress one frame without loss (PNG at its fastest level)."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_frame(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The frame that `encode_frame` compressed."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


def trajectory_table(trajectory: Trajectory) -> pa.Table:
    """One episode as the rows of a store, frames compressed; cheap to send between processes.

    Raises:
        ValueError: frames, actions and end-effector states do not belong together.
        StorageError: an action or end-effector state is not finite; names the start and the step.
    """
    steps = len(trajectory.actions)
    state = trajectory.state
    lengths = {camera: len(frames) for camera, frames in trajectory.images.items()}
    lengths |= {"end-effector states": len(trajectory.ee_state)} | ({} if state is None else {"states": len(state)})
    if not trajectory.images or any(length != steps + 1 for length in lengths.values()):
        raise ValueError(
            f"{trajectory.start}: {', '.join(f'{length} {what}' for what, length in lengths.items())} for {steps} "
            "actions; one more of each than actions was expected, of one camera at least."
        )
    for camera, frames in trajectory.images.items():
        if frames.dtype != np.uint8 or frames.shape[3:] != (3,):
            raise ValueError(f"{trajectory.start}: frames of {camera} must be u8[T+1 H W 3], not {frames.shape}.")
    start = trajectory.start
    where = f"{trajectory.source} trajectory of task {start.task!r}, {start.split} start {start.index}"
    check_trajectory(np.asarray(trajectory.actions, np.float32), np.asarray(trajectory.ee_state, np.float32), where)
    rows = steps + 1
    actions = [*np.asarray(trajectory.actions, np.float32), None]
    columns: dict[str, Any] = {
        "task": [trajectory.start.task] * rows,
        "split": [trajectory.start.split] * rows,
        "start_index": [trajectory.start.index] * rows,
        "instruction": [trajectory.instruction] * rows,
        "source": [trajectory.source] * rows,
        "episode_index": [0] * rows,  # numbered by the shard that takes it
        "step": np.arange(rows),
        "is_final": np.arange(rows) == steps,
        "success": [bool(trajectory.success)] * rows,
        "action": actions,
        "ee_state": list(np.asarray(trajectory.ee_state, np.float32)),
        "control_hz": [trajectory.control_hz] * rows,
    }
    for camera, frames in trajectory.images.items():
        columns[f"image.{camera}"] = [{"bytes": encode_frame(frame), "path": None} for frame in frames]
    if state is not None:
        check_finite(np.asarray(state, np.float32), "state", where)
        columns["state"] = list(np.asarray(state, np.float32))
    schema = _schema(trajectory.images, with_state=state is not None)
    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def table_trajectory(table: pa.Table, where: str) -> Trajectory:
    """The episode that `trajectory_table` turned into rows.

    Args:
        table: its rows.
        where: how an error calls this episode.

    Raises:
        StorageError: the rows are not those of one whole episode, or an action or end-effector state is missing or
            not finite; names the step.
    """
    check_rows(table, where)
    column = {name: table[name].to_pylist() for name, _ in _COLUMNS if name not in ("action", "ee_state")}
    images = {
        camera: np.stack([decode_frame(image["bytes"]) for image in table[name].to_pylist()])
        for camera, name in image_columns(table.schema).items()
    }
    state = table_vectors(table, "state", where) if "state" in table.column_names else None
    if state is not None:
        check_finite(state, "state", where)
    actions, ee_state = table_actions(table, where), table_vectors(table, "ee_state", where)
    check_trajectory(actions, ee_state, where)
    return Trajectory(
        start=Start(column["task"][0], column["split"][0], column["start_index"][0]),
        instruction=column["instruction"][0],
        images=images,
        actions=actions,
        ee_state=ee_state,
        success=column["success"][0],
        source=column["source"][0],
        state=state,
        control_hz=table["control_hz"][0].as_py() if "control_hz" in table.column_names else None,
    )


def table_actions(table: pa.Table, where: str) -> Float32[np.ndarray, "T D"]:
    """The actions of an episode's rows; the final row has none."""
    return table_vectors(table.slice(0, len(table) - 1), "action", where)


def table_vectors(table: pa.Table, name: str, where: str) -> Float32[np.ndarray, "T D"]:
    """A column of vectors of one length.

    Raises:
        StorageError: a row has none, or one of another length.
    """
    rows = table[name].to_pylist()
    try:
        vectors = np.array(rows, np.float32)
    except (ValueError, TypeError) as error:
        raise StorageError(f"{where}: {name} holds vectors of different lengths or none ({error}).") from error
    return vectors.reshape(len(rows), -1) if rows else np.empty((0, 0), np.float32)


class ShardWriter:
    """Writes one shard; it appears under its name only when the `with` block ends without an error."""

    def __init__(self, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Open a shard.

        Args:
            path: where the complete shard will be.
            metadata: facts kept in the file's own metadata, read back by `shard_metadata`.

        Raises:
            StorageError: the folder cannot be written.
        """
        self.path = path
        self.num_trajectories = 0
        self._aside, self._metadata = aside(path), dict(metadata or {})
        self._opened: tuple[pq.ParquetWriter, pa.Schema] | None = None
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            recover(path)

    def _writer(self, columns: pa.Schema) -> tuple[pq.ParquetWriter, pa.Schema]:
        """The file and its columns: those of the first episode."""
        if self._opened is None:
            schema = columns.with_metadata({**(columns.metadata or {}), **self._metadata})
            images = set(image_columns(schema).values())
            # PNG does not compress any further.
            compression = {name: "ZSTD" for name in schema.names if name not in images}
            compression |= {f"{name}.bytes": "NONE" for name in images}
            writer = pq.ParquetWriter(
                self._aside.absolute(),
                schema,
                compression=compression,  # pyright: ignore[reportArgumentType]
                filesystem=LocalFileSystem(),  # and an absolute path: `run:1/x.parquet` would be a URI
                write_page_checksum=True,
            )
            self._opened = writer, schema
        return self._opened

    def write(self, episode: Trajectory | pa.Table) -> None:
        """Append one episode as one row group.

        Raises:
            StorageError: the disk is full, or a number of the episode is not finite.
            ConfigError: it has other cameras than the episodes before it, or a state where they have none.
        """
        table = trajectory_table(episode) if isinstance(episode, Trajectory) else episode
        number = pa.array([self.num_trajectories] * len(table), pa.int32())
        table = table.set_column(table.schema.get_field_index("episode_index"), "episode_index", number)
        with storage_errors(self.path):
            writer, schema = self._writer(table.schema)
            if table.schema.names != schema.names:
                raise ConfigError(
                    f"{self.path}: an episode has the columns {', '.join(table.schema.names)}; those before it have "
                    f"{', '.join(schema.names)}. A store holds the same cameras and state throughout: collect "
                    "these into a folder of their own."
                )
            writer.write_table(table.cast(schema), row_group_size=len(table))
        self.num_trajectories += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self._abandon()
                return
            with storage_errors(self.path):
                # Without any episode the shard has no camera.
                self._writer(_schema((), with_state=False))[0].close()
                with self._aside.open("rb") as file:
                    os.fsync(file.fileno())
                self._aside.replace(self.path)
        finally:
            self._aside.unlink(missing_ok=True)

    def _abandon(self) -> None:
        """Close a file that nobody will read; the error that led here is the one to report."""
        with contextlib.suppress(OSError, pa.ArrowException):
            if self._opened is not None:
                self._opened[0].close()


def write_shard(path: Path, trajectories: Iterable[Trajectory], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a whole shard from an iterable of episodes, holding one of them at a time.

    Raises:
        StorageError: the disk is full or the folder cannot be written; no part of the shard remains.
    """
    with ShardWriter(path, metadata=metadata) as writer:
        for trajectory in trajectories:
            writer.write(trajectory)


def open_shard(shard: Path) -> pq.ParquetFile:
    """Open a shard for reading, every page to be checked against its checksum.

    Raises:
        StorageError: it is missing, truncated or no shard of trajectories.
    """
    try:
        file = pq.ParquetFile(shard.absolute(), page_checksum_verification=True, filesystem=LocalFileSystem())
    except (pa.ArrowException, OSError) as error:
        raise damaged(shard, error) from error
    if missing := [name for name, _ in _COLUMNS if name not in file.schema_arrow.names]:
        raise StorageError(f"{shard}: not a shard of trajectories: it has no column {missing[0]!r}.")
    if file.num_row_groups and not image_columns(file.schema_arrow):
        raise StorageError(f"{shard}: not a shard of trajectories: it has no column of frames, `image.<camera>`.")
    return file


def damaged(shard: Path, error: Exception) -> StorageError:
    """The error to raise for a shard that cannot be read."""
    remedy = "Delete this file and meta.json beside it, then collect again: the other shards are kept."
    if isinstance(error, FileNotFoundError):
        remedy = "Delete the store's folder and collect again."
    return unreadable(shard, error, remedy=remedy, missing="this shard is missing")


def shard_metadata(shard: Path) -> dict[str, str]:
    """The facts given to `ShardWriter` when the shard was written.

    Raises:
        StorageError: the shard is truncated or damaged.
    """
    with open_shard(shard) as file:
        metadata = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def iter_shard(shard: Path) -> Iterator[Trajectory]:
    """Read a shard's episodes in order, one row group in memory at a time.

    Raises:
        StorageError: the shard is truncated or damaged.
    """
    with open_shard(shard) as file:
        for group in range(file.num_row_groups):
            try:
                trajectory = table_trajectory(file.read_row_group(group), f"{shard}, episode {group}")
            except (pa.ArrowException, OSError) as error:
                raise damaged(shard, error) from error
            yield trajectory
