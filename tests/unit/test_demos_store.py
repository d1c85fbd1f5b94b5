"""The trajectory store: bit-exact, streamed, atomic, and outspoken about damage."""

import dataclasses
import errno
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reachrl.demos.episode_table import trajectory_table
from reachrl.demos.store import (
    META_FILE,
    ShardWriter,
    TrajectoryStore,
    finish_store,
    iter_shard,
    iter_trajectories,
    shard_metadata,
    write_shard,
)
from reachrl.errors import ConfigError, StorageError
from reachrl.types import Start, Trajectory


def trajectory(index: int, *, task: str = "reach", steps: int = 5, size: int = 10, dim: int = 3) -> Trajectory:
    rng = np.random.default_rng([index, steps])
    return Trajectory(
        start=Start(task, "train", index),
        instruction=f"{task} the ünïcode goal",
        images={"camera": rng.integers(0, 256, (steps + 1, size, size, 3), dtype=np.uint8)},
        actions=rng.normal(size=(steps, dim)).astype(np.float32),
        ee_state=rng.normal(size=(steps + 1, 4)).astype(np.float32),
        success=index % 2 == 0,
        source="expert",
    )


def assert_same(a: Trajectory, b: Trajectory) -> None:
    assert list(a.images) == list(b.images) == ["camera"]
    for name in ("frames", "actions", "ee_state"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert (a.start, a.instruction, a.success, a.source) == (b.start, b.instruction, b.success, b.source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path / "reach.parquet", [trajectory(i, steps=3 + i) for i in range(4)])
    write_shard(tmp_path / "push.parquet", [trajectory(i, task="push") for i in range(2)])
    finish_store(tmp_path, ["reach.parquet", "push.parquet"], info={"seed": 3})
    return tmp_path


EXPECTED = [trajectory(i, steps=3 + i) for i in range(4)] + [trajectory(i, task="push") for i in range(2)]


def test_round_trip_is_bit_exact(folder: Path) -> None:
    found = list(iter_trajectories(folder))
    for a, b in zip(EXPECTED, found, strict=True):
        assert_same(a, b)


def test_meta_counts_and_quantiles(folder: Path) -> None:
    store = TrajectoryStore(folder)
    assert len(store) == 6
    assert store.tasks == ("reach", "push")
    assert store.meta["num_steps"] == 3 + 4 + 5 + 6 + 5 + 5
    assert store.meta["cameras"] == {"camera": [10, 10]}
    assert store.meta["info"] == {"seed": 3}
    column = np.sort(np.concatenate([t.actions for t in EXPECTED])[:, 1].astype(np.float64))
    position = 0.01 * (len(column) - 1)  # linear interpolation between order statistics, by hand
    low = column[int(position)] + (position % 1) * (column[int(position) + 1] - column[int(position)])
    assert store.action_stats().q01[1] == pytest.approx(low, rel=1e-12)
    assert store.action_stats().mask.all()


def store_of(folder: Path, actions: np.ndarray, name: str = "a.parquet") -> Path:
    """A store of one episode with these actions."""
    steps = len(actions)
    one = dataclasses.replace(
        trajectory(0, steps=steps, dim=actions.shape[1], size=8), actions=actions.astype(np.float32)
    )
    write_shard(folder / name, [one])
    return folder


def test_a_dimension_that_never_moves_keeps_its_constant(tmp_path: Path) -> None:
    moving = np.linspace(-1, 1, 50)
    finish_store(store_of(tmp_path, np.stack([moving, np.full(50, 1.57), np.full(50, 0.0)], 1)), ["a.parquet"])
    stats = TrajectoryStore(tmp_path).action_stats()
    assert stats.unnormalise(np.array([0.3, 0.996, -0.996]))[1:].tolist() == [float(np.float32(1.57)), 0.0]


def test_statistics_of_an_earlier_version_are_not_believed(tmp_path: Path) -> None:
    """They say of a gripper that closed in 1 of 200 steps that it never moves, and let it pass through."""
    gripper = np.where(np.arange(200) == 77, 0.0, 1.57)
    finish_store(store_of(tmp_path, np.stack([np.linspace(-1, 1, 200), gripper], 1)), ["a.parquet"])
    meta = json.loads((tmp_path / META_FILE).read_text())
    meta["action_stats"] = {"q01": [-0.98, 1.57], "q99": [0.98, 1.57], "mask": [True, False]}
    (tmp_path / META_FILE).write_text(json.dumps(meta))
    stats = TrajectoryStore(tmp_path).action_stats()
    assert (stats.q01[1], stats.q99[1], stats.mask[1]) == (0.0, float(np.float32(1.57)), True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["actions", "ee_state"])
def test_what_is_not_finite_is_not_stored(tmp_path: Path, field: str, value: float) -> None:
    good = trajectory(1)
    values = getattr(good, field).copy()
    values[2, 1] = value
    name = "action" if field == "actions" else "ee_state"
    with pytest.raises(StorageError, match=rf"'reach', train start 1, step 2: {name}.* is {value} in dimension 1"):
        write_shard(tmp_path / "a.parquet", [trajectory(0), dataclasses.replace(good, **{field: values})])
    assert list(tmp_path.iterdir()) == []


def test_an_episode_without_recorded_poses_is_kept_as_such(tmp_path: Path) -> None:
    none = dataclasses.replace(trajectory(0), ee_state=np.full((6, 4), np.nan, np.float32))
    write_shard(tmp_path / "a.parquet", [none])
    finish_store(tmp_path, ["a.parquet"])
    assert_same(none, next(iter_trajectories(tmp_path)))


def spoil(shard: Path, column: str, episode: int, step: int) -> None:
    """Put a NaN into a shard that was written before anybody looked."""
    with pq.ParquetFile(shard) as file:
        groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
        schema = file.schema_arrow
    rows = groups[episode][column].to_pylist()
    rows[step][0] = np.nan
    place = schema.get_field_index(column)
    groups[episode] = groups[episode].set_column(place, schema.field(place), pa.array(rows, schema.field(place).type))
    with pq.ParquetWriter(shard, schema) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=len(group))


@pytest.mark.parametrize("column", ["action", "ee_state"])
def test_a_nan_in_a_store_written_earlier_is_refused(folder: Path, column: str) -> None:
    spoil(folder / "reach.parquet", column, 2, 3)
    match = rf"reach.parquet, episode 2, step 3: {column}.* is nan in dimension 0"
    with pytest.raises(StorageError, match=match):
        list(iter_shard(folder / "reach.parquet"))
    with pytest.raises(StorageError, match=match):
        finish_store(folder, ["reach.parquet", "push.parquet"])
    meta = json.loads((folder / META_FILE).read_text())
    meta["shards"][0]["bytes"] = (folder / "reach.parquet").stat().st_size
    (folder / META_FILE).write_text(json.dumps(meta))
    with pytest.raises(StorageError, match=match):
        TrajectoryStore(folder).load()
    if column == "action":
        with pytest.raises(StorageError, match=match):
            TrajectoryStore(folder).action_stats()


def test_a_shard_that_may_not_be_read_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pq, "ParquetFile", forbidden)
    with pytest.raises(StorageError, match="reach.parquet: cannot be opened \\(Permission denied") as error:
        list(iter_shard(folder / "reach.parquet"))
    assert "damaged" not in str(error.value) and "Delete" not in str(error.value)


def test_load_leaves_final_frames_out(folder: Path) -> None:
    data = TrajectoryStore(folder).load()
    np.testing.assert_array_equal(data.images["camera"], np.concatenate([t.frames[:-1] for t in EXPECTED]))
    np.testing.assert_array_equal(data.actions, np.concatenate([t.actions for t in EXPECTED]))
    assert [data.instructions[i] for i in data.instruction_ids] == [t.instruction for t in EXPECTED for _ in t.actions]
    assert [data.starts[i] for i in data.trajectory_ids] == [t.start for t in EXPECTED for _ in t.actions]


def test_reading_holds_one_row_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def spy(self, group, **kwargs):
        read.append(group)
        return original(self, group, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    stream = iter_trajectories(folder)
    for count in range(1, 4):
        next(stream)
        assert len(read) == count  # nothing is read ahead


def test_plain_parquet_readers_understand_it(folder: Path) -> None:
    table = pq.read_table(folder / "reach.parquet")
    rows = table.to_pylist()
    final = [row for row in rows if row["is_final"]]
    assert len(final) == 4
    assert all(row["action"] is None for row in final)
    assert [row["step"] for row in rows if row["episode_index"] == 1] == [0, 1, 2, 3, 4]
    frame = np.array(Image.open(io.BytesIO(rows[0]["image.camera"]["bytes"])))
    np.testing.assert_array_equal(frame, EXPECTED[0].frames[0])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.schema.names
    assert features["image.camera"] == {"_type": "Image"}


def test_without_meta_a_store_is_incomplete(folder: Path) -> None:
    (folder / META_FILE).unlink()
    with pytest.raises(StorageError, match="no complete store"):
        TrajectoryStore(folder)


def test_truncated_shard_is_named(folder: Path) -> None:
    shard = folder / "push.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StorageError, match="push.parquet: truncated or damaged"):
        TrajectoryStore(folder)
    with pytest.raises(StorageError, match="push.parquet: truncated or damaged"):
        list(iter_shard(shard))


def test_flipped_bit_is_noticed(folder: Path) -> None:
    shard = folder / "push.parquet"
    data = bytearray(shard.read_bytes())
    middle = data.find(b"IDAT") + 40  # inside a frame
    data[middle] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(StorageError, match="push.parquet: truncated or damaged"):
        list(iter_trajectories(folder))


def test_missing_shard_and_other_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "push.parquet").unlink()
    with pytest.raises(StorageError, match="push.parquet"):
        TrajectoryStore(folder)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(StorageError, match="no column 'task'"):
        list(iter_shard(tmp_path / "other.parquet"))


@pytest.mark.parametrize("key", ["shards", "tasks", "num_trajectories", "num_steps", "action_dim", "cameras"])
def test_a_meta_without_what_reading_needs_is_damaged(folder: Path, key: str) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    for changed in ({k: v for k, v in meta.items() if k != key}, {**meta, key: None}, {**meta, key: "text"}):
        (folder / META_FILE).write_text(json.dumps(changed))
        with pytest.raises(StorageError, match=rf"meta.json: {key} is .*damaged"):
            TrajectoryStore(folder)
    (folder / META_FILE).write_text(json.dumps({**meta, "shards": ["reach.parquet"]}))
    with pytest.raises(StorageError, match=r"meta.json: shards is .*damaged"):
        TrajectoryStore(folder)
    (folder / META_FILE).write_text("[]")
    with pytest.raises(StorageError, match="format_version is None"):
        TrajectoryStore(folder)


@pytest.mark.parametrize("how", ["filtered", "cut", "joined"])
def test_rows_that_were_changed_since_they_were_written_are_refused(folder: Path, how: str) -> None:
    """A row's action belongs to its own frame; counting would pair it with another."""
    shard = folder / "push.parquet"
    with pq.ParquetFile(shard) as file:
        groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    tables = {
        "filtered": [groups[0].filter([True, False, True, True, True, True]), groups[1]],
        "cut": [groups[0].slice(0, 4), groups[1]],
        "joined": [pa.concat_tables(groups)],
    }[how]
    with pq.ParquetWriter(shard, groups[0].schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    for read in (lambda: list(iter_shard(shard)), lambda: finish_store(folder, ["reach.parquet", "push.parquet"])):
        with pytest.raises(StorageError, match=r"push.parquet, episode 0: \d+ rows that are not one whole episode"):
            read()


def test_newer_format_is_refused(folder: Path) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(StorageError, match="format_version is 99"):
        TrajectoryStore(folder)


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.parquet") as writer:
        writer.write(trajectory(0))
        assert not (tmp_path / "a.parquet").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_full_disk_loses_nothing_written_earlier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(StorageError, match="No space left"):
            write_shard(folder / "reach.parquet", [trajectory(9)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            write_shard(folder / "reach.parquet", [trajectory(9)])
        with pytest.raises(StorageError, match="No space left"):
            finish_store(folder, ["push.parquet"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_metadata_round_trip(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [trajectory(0)], metadata={"collection_id": "abc"})
    assert shard_metadata(tmp_path / "a.parquet")["collection_id"] == "abc"


def test_shapes_must_belong_together(tmp_path: Path) -> None:
    good = trajectory(0)
    fields = {name: getattr(good, name) for name in Trajectory.__slots__}
    unequal = SimpleNamespace(
        **{**fields, "images": {"camera": good.frames[:-1]}}
    )  # the record's own check is for tests only
    with pytest.raises(ValueError, match="one more of each than actions"):
        trajectory_table(unequal)  # pyright: ignore[reportArgumentType]
    write_shard(tmp_path / "a.parquet", [trajectory(0), trajectory(1, size=12)])
    with pytest.raises(ConfigError, match="one frame size"):
        finish_store(tmp_path, ["a.parquet"])
