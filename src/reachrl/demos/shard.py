"""One shard of a trajectory store: episodes as Parquet rows (`episode_table`), written aside and renamed.

A row group holds exactly one episode, so reading needs memory for one. Shards of format 1 hold one camera in a column
`image` and neither `state` nor `control_hz`.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from reachrl.demos.damage import unreadable
from reachrl.demos.episode_table import COLUMNS, image_columns, schema_of, table_trajectory, trajectory_table
from reachrl.errors import ConfigError, StorageError
from reachrl.run.atomic import aside, recover, storage_errors
from reachrl.types import Trajectory

READABLE_VERSIONS = (1, 2)


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
                self._writer(schema_of((), with_state=False))[0].close()
                with self._aside.open("rb") as file:
                    os.fsync(file.fileno())
                self._aside.replace(self.path)
        finally:
            self._aside.unlink(missing_ok=True)

    def _abandon(self) -> None:
        """Close an abandoned file; the error that led here is the one to report."""
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
    if missing := [name for name, _ in COLUMNS if name not in file.schema_arrow.names]:
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
