"""Trajectory stores: folders of shards with a `meta.json`, read one episode at a time or whole into memory.

`meta.json` is written last: without it the store is incomplete. The rows of a shard are described in `shard.py`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, UInt8

from reachrl.demos.checks import check_finite
from reachrl.demos.damage import unreadable
from reachrl.demos.episode_table import FORMAT_VERSION, table_actions, table_vectors
from reachrl.demos.scan import Shapes, columns, scan
from reachrl.demos.shard import (
    READABLE_VERSIONS,
    ShardWriter,
    damaged,
    iter_shard,
    open_shard,
    shard_metadata,
    write_shard,
)
from reachrl.errors import ConfigError, StorageError
from reachrl.functional.action_stats import ActionStats
from reachrl.run.atomic import write_json_atomic
from reachrl.types import Start, Trajectory

__all__ = [
    "META_FILE",
    "ShardWriter",
    "TrajectoryStore",
    "Transitions",
    "finish_store",
    "iter_shard",
    "iter_trajectories",
    "shard_metadata",
    "write_shard",
]

META_FILE = "meta.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """Every (frame, instruction, action) of a store in memory; final frames, which have no action, left out."""

    images: dict[str, UInt8[np.ndarray, "R H W 3"]]
    state: Float32[np.ndarray, "R S"] | None
    actions: Float32[np.ndarray, "R D"]
    instruction_ids: Int64[np.ndarray, "R"]  # index into `instructions`
    instructions: tuple[str, ...]
    trajectory_ids: Int64[np.ndarray, "R"]  # index into `starts`
    starts: tuple[Start, ...]

    def chunks(self, length: int) -> Float32[np.ndarray, "R H D"]:
        """Each step's action and the ones that follow it, `length` in all.

        Behind the end of its demonstration the last action is repeated: what comes after a success is not carried out,
        and an answer has to be as long as any other.
        """
        rows = np.arange(len(self.actions))
        last = np.searchsorted(self.trajectory_ids, self.trajectory_ids, side="right") - 1
        return self.actions[np.minimum(rows[:, None] + np.arange(length), last[:, None])]


def finish_store(folder: Path, shards: Sequence[str], *, info: Mapping[str, Any] | None = None) -> "TrajectoryStore":
    """Declare a store complete: read what its shards hold and write `meta.json`.

    Args:
        folder: the store.
        shards: file names in `folder`, in reading order.
        info: facts about the origin of the data, kept under `info`.

    Raises:
        StorageError: a shard is missing or damaged, a number in it is not finite, or `meta.json` cannot be written.
        ConfigError: the shards hold no step, or cameras, states or actions of different shapes.
    """
    actions: list[np.ndarray] = []
    counts: dict[str, int] = {}
    shapes: list[Shapes] = []
    records = [scan(folder / name, actions, counts, shapes) for name in shards]
    dims = {len(action) for action in actions}
    if len(shapes) != 1 or len(dims) != 1:
        raise ConfigError(
            f"{folder}: one frame size for each camera, one length of states and one of actions expected in a store, "
            f"found {' and '.join(map(str, shapes)) or 'no frames'}, and action lengths {sorted(dims)}. Collect each "
            "environment into a folder of its own."
        )
    stats = ActionStats.of_actions(np.stack(actions))
    meta = {
        "format_version": FORMAT_VERSION,
        "cameras": {camera: list(size) for camera, size in shapes[0].cameras.items()},
        "state_size": shapes[0].state_size,
        "action_dim": dims.pop(),
        "num_trajectories": sum(counts.values()),
        "num_steps": len(actions),
        "tasks": counts,
        "action_stats": {"q01": stats.q01.tolist(), "q99": stats.q99.tolist(), "mask": stats.mask.tolist()},
        "shards": records,
        "info": dict(info or {}),
    }
    write_json_atomic(folder / META_FILE, meta)
    return TrajectoryStore(folder)


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
            raise unreadable(path, error, remedy="Delete it and run the demos stage again.") from error
        version = self.meta.get("format_version") if isinstance(self.meta, dict) else None
        if version not in READABLE_VERSIONS:
            raise StorageError(
                f"{path}: format_version is {version!r}, this version of reachrl reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}. "
                "Collect again, or use the version that wrote it."
            )
        if version == 1 and isinstance(self.meta.get("image_size"), list):  # one camera, without a name
            self.meta |= {"cameras": {"image": self.meta["image_size"]}, "state_size": None}
        self._check_meta(path)
        for record in self.meta["shards"]:
            shard = self.folder / record["name"]
            size = shard.stat().st_size if shard.exists() else None
            if size != record["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise damaged(shard, OSError(f"{record['bytes']} bytes expected, {found}"))

    def _check_meta(self, path: Path) -> None:
        """Refuse a `meta.json` without the keys that reading needs."""
        kinds = {"shards": list, "tasks": dict, "cameras": dict} | dict.fromkeys(
            ("num_trajectories", "num_steps", "action_dim"), int
        )
        bad = [key for key, kind in kinds.items() if not isinstance(self.meta.get(key), kind)]
        if not bad and not all(
            isinstance(each, dict)
            and isinstance(each.get("name"), str)
            and Path(each["name"]).name == each["name"]  # a file beside this one
            and "bytes" in each
            for each in self.meta["shards"]
        ):
            bad = ["shards"]
        if not bad and not isinstance(self.meta.get("state_size", ""), int | None):
            bad = ["state_size"]
        if bad:
            raise StorageError(
                f"{path}: {bad[0]} is {str(self.meta.get(bad[0]))[:60]!r}, so this file is damaged. Delete it and run "
                "the demos stage again: complete shards are kept."
            )

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
        """The statistics of all recorded actions, as `Policy.set_action_stats` takes them.

        They are computed from the shards: a `meta.json` of an earlier version may hold others, by which a dimension
        that rarely moved, or held a NaN, counted as one that never moves.

        Raises:
            StorageError: a shard is damaged, or an action is not finite; names the episode and the step.
        """
        actions: list[np.ndarray] = []
        for where, table in self._columns("action"):
            actions.append(table_actions(table, where))
            check_finite(actions[-1], "action", where)
        return ActionStats.of_actions(np.concatenate(actions))

    def hand_states(self) -> Iterator[Float32[np.ndarray, "T+1 4"]]:
        """The end-effector's states of each trajectory, without decoding its images.

        Raises:
            StorageError: a shard is damaged.
        """
        return (table_vectors(table, "ee_state", where) for where, table in self._columns("ee_state"))

    def _columns(self, *names: str) -> Iterator[tuple[str, pa.Table]]:
        """Some columns of each trajectory, with where it lies, for messages."""
        for shard in self.shards:
            with open_shard(shard) as file:
                for group in range(file.num_row_groups):
                    yield f"{shard}, episode {group}", columns(file, shard, group, list(names))

    def __iter__(self) -> Iterator[Trajectory]:
        for shard in self.shards:
            yield from iter_shard(shard)

    def load(self) -> Transitions:
        """Decode every step into memory (27 KiB a frame at 96 px)."""
        steps, size = self.meta["num_steps"], self.meta["state_size"]
        images = {
            camera: np.empty((steps, height, width, 3), np.uint8)
            for camera, (height, width) in self.meta["cameras"].items()
        }
        state = None if size is None else np.empty((steps, size), np.float32)
        actions = np.empty((steps, self.meta["action_dim"]), np.float32)
        instruction_ids, trajectory_ids = np.empty(steps, np.int64), np.empty(steps, np.int64)
        instructions: dict[str, int] = {}
        starts: list[Start] = []
        row = 0
        for trajectory in self:
            rows = slice(row, row + len(trajectory.actions))
            for camera, seen in images.items():
                seen[rows] = trajectory.images[camera][:-1]
            if state is not None and trajectory.state is not None:
                state[rows] = trajectory.state[:-1]
            actions[rows] = trajectory.actions
            instruction_ids[rows] = instructions.setdefault(trajectory.instruction, len(instructions))
            trajectory_ids[rows] = len(starts)
            starts.append(trajectory.start)
            row = rows.stop
        return Transitions(
            images=images,
            state=state,
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
