"""Trajectories on disk: one Parquet row per step, frames as PNG, read back bit for bit and one episode at a time.

A store is a folder of shards `*.parquet` and a `meta.json`, which is written last: without it the store is
incomplete. Shards are written aside and renamed, so each is complete or absent. One row is one frame:

    task, split, start_index   which numbered start state the episode began from
    instruction, source        the sentence shown; who acted ("expert", "policy", ...)
    episode_index              number of the episode within its shard
    step, is_final, success    position; the frame after the last action; whether the episode succeeded
    image                      {bytes: PNG, path: null}, the layout that Hugging Face `datasets` decodes
    action                     f32[D] in the environment's units, null on the final row
    ee_state                   f32[4], x y z in metres and gripper opening 0..1

A row group holds exactly one episode, so reading needs memory for one. `pandas.read_parquet(shard)` and
`datasets.load_dataset("parquet", data_files="folder/*.parquet")` open it without this package.
"""

import errno
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image

from reachrl.errors import ConfigError, StorageError
from reachrl.types import Start, Trajectory

FORMAT_VERSION = 1
META_FILE = "meta.json"

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
    ("image", _IMAGE),
    ("action", pa.list_(pa.float32())),
    ("ee_state", pa.list_(pa.float32())),
]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How Hugging Face `datasets` names a column's type."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    return {"dtype": str(kind), "_type": "Value"}


SCHEMA = pa.schema(
    _COLUMNS,
    metadata={
        "huggingface": json.dumps({"info": {"features": {name: _feature(kind) for name, kind in _COLUMNS}}}),
        "reachrl_format": str(FORMAT_VERSION),
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionStats:
    """Quantiles of the recorded actions, as `Policy.set_action_stats` takes them."""

    q01: Float64[np.ndarray, "D"]
    q99: Float64[np.ndarray, "D"]
    mask: Bool[np.ndarray, "D"]  # False: the dimension never moves and passes through unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """Every (frame, instruction, action) of a store in memory; final frames, which have no action, left out."""

    images: UInt8[np.ndarray, "S H W 3"]
    actions: Float32[np.ndarray, "S D"]
    instruction_ids: Int64[np.ndarray, "S"]  # index into `instructions`
    instructions: tuple[str, ...]
    trajectory_ids: Int64[np.ndarray, "S"]  # index into `starts`
    starts: tuple[Start, ...]


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
    """
    steps = len(trajectory.actions)
    if not len(trajectory.images) == len(trajectory.ee_state) == steps + 1:
        raise ValueError(
            f"{trajectory.start}: {len(trajectory.images)} frames and {len(trajectory.ee_state)} end-effector states "
            f"for {steps} actions; one more of each than actions was expected."
        )
    if trajectory.images.dtype != np.uint8 or trajectory.images.shape[3:] != (3,):
        raise ValueError(f"{trajectory.start}: frames must be u8[T+1 H W 3], not {trajectory.images.shape}.")
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
        "image": [{"bytes": encode_frame(frame), "path": None} for frame in trajectory.images],
        "action": actions,
        "ee_state": list(np.asarray(trajectory.ee_state, np.float32)),
    }
    return pa.table([pa.array(columns[name], type=kind) for name, kind in _COLUMNS], schema=SCHEMA)


def table_trajectory(table: pa.Table) -> Trajectory:
    """The episode that `trajectory_table` turned into rows."""
    column = {name: table[name].to_pylist() for name, _ in _COLUMNS if name not in ("image", "action", "ee_state")}
    images = [decode_frame(image["bytes"]) for image in table["image"].to_pylist()]
    actions = table["action"].to_pylist()[:-1]
    return Trajectory(
        start=Start(column["task"][0], column["split"][0], column["start_index"][0]),
        instruction=column["instruction"][0],
        images=np.stack(images),
        actions=np.array(actions, np.float32).reshape(len(actions), -1),
        ee_state=np.array(table["ee_state"].to_pylist(), np.float32),
        success=column["success"][0],
        source=column["source"][0],
    )


def _storage_error(error: OSError, path: Path) -> StorageError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return StorageError(
        f"{path}: could not be written: {reason}. Files written earlier are intact; free space or choose another "
        "folder, then run the same command again to continue."
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside and rename it into place.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _storage_error(error, path) from error


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
        self._aside = path.with_name(path.name + ".partial")
        schema = SCHEMA.with_metadata({**(SCHEMA.metadata or {}), **(metadata or {})})
        # PNG does not compress any further.
        compression = {"image.bytes": "NONE"} | {name: "ZSTD" for name, _ in _COLUMNS if name != "image"}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._aside,
                schema,
                compression=compression,  # pyright: ignore[reportArgumentType]
                write_page_checksum=True,
            )
        except OSError as error:
            raise _storage_error(error, path) from error
        self._schema = schema

    def write(self, episode: Trajectory | pa.Table) -> None:
        """Append one episode as one row group.

        Raises:
            StorageError: the disk is full.
        """
        table = trajectory_table(episode) if isinstance(episode, Trajectory) else episode
        number = pa.array([self.num_trajectories] * len(table), pa.int32())
        table = table.set_column(table.schema.get_field_index("episode_index"), "episode_index", number)
        try:
            self._writer.write_table(table.cast(self._schema), row_group_size=len(table))
        except OSError as error:
            raise _storage_error(error, self.path) from error
        self.num_trajectories += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close()
            if kind is None:
                with self._aside.open("rb") as file:
                    os.fsync(file.fileno())
                self._aside.replace(self.path)
        except OSError as failure:
            if kind is None:
                raise _storage_error(failure, self.path) from failure
        finally:
            self._aside.unlink(missing_ok=True)


def write_shard(path: Path, trajectories: Iterable[Trajectory], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a whole shard from an iterable of episodes, holding one of them at a time.

    Raises:
        StorageError: the disk is full or the folder cannot be written; no part of the shard remains.
    """
    with ShardWriter(path, metadata=metadata) as writer:
        for trajectory in trajectories:
            writer.write(trajectory)


def _open(shard: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(shard, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(shard, error) from error
    if missing := [name for name, _ in _COLUMNS if name not in file.schema_arrow.names]:
        raise StorageError(f"{shard}: not a shard of trajectories: it has no column {missing[0]!r}.")
    return file


def _damaged(shard: Path, error: Exception) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{shard}: this shard is missing. Delete the store's folder and collect again.")
    return StorageError(
        f"{shard}: truncated or damaged ({str(error).splitlines()[0]}). Delete this file and {META_FILE} beside it, "
        "then collect again: the other shards are kept."
    )


def shard_metadata(shard: Path) -> dict[str, str]:
    """The facts given to `ShardWriter` when the shard was written.

    Raises:
        StorageError: the shard is truncated or damaged.
    """
    with _open(shard) as file:
        metadata = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def iter_shard(shard: Path) -> Iterator[Trajectory]:
    """Read a shard's episodes in order, one row group in memory at a time.

    Raises:
        StorageError: the shard is truncated or damaged.
    """
    with _open(shard) as file:
        for group in range(file.num_row_groups):
            try:
                trajectory = table_trajectory(file.read_row_group(group))
            except (pa.ArrowException, OSError) as error:
                raise _damaged(shard, error) from error
            yield trajectory


def compute_action_stats(actions: Float32[np.ndarray, "S D"]) -> ActionStats:
    """The 1 % and 99 % quantiles of each action dimension (linear interpolation, as numpy's default).

    A dimension whose quantiles coincide cannot be un-normalised: its mask is False and it passes through.
    """
    q01, q99 = np.quantile(np.asarray(actions, np.float64), [0.01, 0.99], axis=0)
    return ActionStats(q01=q01, q99=q99, mask=(q99 - q01) > 1e-6)


def finish_store(folder: Path, shards: Sequence[str], *, info: Mapping[str, Any] | None = None) -> "TrajectoryStore":
    """Declare a store complete: read what its shards hold and write `meta.json`.

    Args:
        folder: the store.
        shards: file names in `folder`, in reading order.
        info: facts about the origin of the data, kept under `info`.

    Raises:
        StorageError: a shard is missing or damaged, or `meta.json` cannot be written.
        ConfigError: the shards hold no step, or frames or actions of different shapes.
    """
    actions: list[np.ndarray] = []
    counts: dict[str, int] = {}
    sizes: set[tuple[int, int]] = set()
    records = []
    for name in shards:
        with _open(folder / name) as file:
            records.append(
                {
                    "name": name,
                    "trajectories": file.num_row_groups,
                    "rows": file.metadata.num_rows,
                    "bytes": (folder / name).stat().st_size,
                }
            )
            for group in range(file.num_row_groups):
                try:
                    table = file.read_row_group(group, columns=["task", "action", "image"])
                except (pa.ArrowException, OSError) as error:
                    raise _damaged(folder / name, error) from error
                task = table["task"][0].as_py()
                counts[task] = counts.get(task, 0) + 1
                actions += [np.array(action, np.float32) for action in table["action"].to_pylist()[:-1]]
                sizes.add(_frame_size(table["image"][0].as_py()["bytes"]))
    dims = {len(action) for action in actions}
    if len(sizes) != 1 or len(dims) != 1:
        raise ConfigError(
            f"{folder}: one frame size and one action length expected in a store, found sizes {sorted(sizes)} and "
            f"lengths {sorted(dims)}. Collect each environment into a folder of its own."
        )
    stats = compute_action_stats(np.stack(actions))
    height, width = sizes.pop()
    meta = {
        "format_version": FORMAT_VERSION,
        "image_size": [height, width],
        "action_dim": dims.pop(),
        "num_trajectories": sum(counts.values()),
        "num_steps": len(actions),
        "tasks": counts,
        "action_stats": {"q01": stats.q01.tolist(), "q99": stats.q99.tolist(), "mask": stats.mask.tolist()},
        "shards": records,
        "info": dict(info or {}),
    }
    write_json(folder / META_FILE, meta)
    return TrajectoryStore(folder)


def _frame_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


class TrajectoryStore:
    """A complete store, opened for reading; opening it reads `meta.json` only."""

    def __init__(self, folder: Path) -> None:
        """Open the store in `folder`.

        Raises:
            StorageError: there is no complete store, a shard is missing or has another size, or the format is newer.
        """
        self.folder = Path(folder)
        path = self.folder / META_FILE
        try:
            self.meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StorageError(
                f"{path}: not found, so there is no complete store of trajectories here. Run the demos stage."
            ) from error
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: unreadable ({error}). Delete it and run the demos stage again.") from error
        version = self.meta.get("format_version")
        if version != FORMAT_VERSION:
            raise StorageError(
                f"{path}: format_version is {version!r}, this version of reachrl reads {FORMAT_VERSION}. "
                "Collect again, or use the version that wrote it."
            )
        for record in self.meta["shards"]:
            shard = self.folder / record["name"]
            size = shard.stat().st_size if shard.exists() else None
            if size != record["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise _damaged(shard, OSError(f"{record['bytes']} bytes expected, {found}"))

    def __len__(self) -> int:
        return int(self.meta["num_trajectories"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with at least one trajectory, in the order of the shards."""
        return tuple(self.meta["tasks"])

    @property
    def shards(self) -> list[Path]:
        """The shard files, in reading order."""
        return [self.folder / record["name"] for record in self.meta["shards"]]

    def action_stats(self) -> ActionStats:
        """The quantiles of all recorded actions."""
        stats = self.meta["action_stats"]
        return ActionStats(
            q01=np.array(stats["q01"], np.float64),
            q99=np.array(stats["q99"], np.float64),
            mask=np.array(stats["mask"], np.bool_),
        )

    def __iter__(self) -> Iterator[Trajectory]:
        for shard in self.shards:
            yield from iter_shard(shard)

    def load(self) -> Transitions:
        """Decode every step into memory (27 KiB a frame at 96 px)."""
        steps, (height, width) = self.meta["num_steps"], self.meta["image_size"]
        images = np.empty((steps, height, width, 3), np.uint8)
        actions = np.empty((steps, self.meta["action_dim"]), np.float32)
        instruction_ids, trajectory_ids = np.empty(steps, np.int64), np.empty(steps, np.int64)
        instructions: dict[str, int] = {}
        starts: list[Start] = []
        row = 0
        for trajectory in self:
            rows = slice(row, row + len(trajectory.actions))
            images[rows], actions[rows] = trajectory.images[:-1], trajectory.actions
            instruction_ids[rows] = instructions.setdefault(trajectory.instruction, len(instructions))
            trajectory_ids[rows] = len(starts)
            starts.append(trajectory.start)
            row = rows.stop
        return Transitions(
            images=images,
            actions=actions,
            instruction_ids=instruction_ids,
            instructions=tuple(instructions),
            trajectory_ids=trajectory_ids,
            starts=tuple(starts),
        )


def iter_trajectories(folder: Path) -> Iterator[Trajectory]:
    """Stream the trajectories of a complete store, one in memory at a time.

    Raises:
        StorageError: the store is incomplete, or a shard is truncated or damaged.
    """
    yield from TrajectoryStore(folder)
