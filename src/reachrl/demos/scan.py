"""Scan of a shard without decoding frames: the facts that a store's `meta.json` records of it."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reachrl.demos.checks import check_rows, check_trajectory
from reachrl.demos.episode_table import image_columns, table_actions, table_vectors
from reachrl.demos.shard import (
    damaged,
    open_shard,
)


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the episodes of a store have in common."""

    cameras: dict[str, tuple[int, int]]  # height and width of the frames
    state_size: int | None

    def __str__(self) -> str:
        sizes = ", ".join(f"{camera} {height}x{width}" for camera, (height, width) in self.cameras.items())
        return f"{sizes} with {f'{self.state_size} numbers of state' if self.state_size else 'no state'}"


def scan(shard: Path, actions: list[np.ndarray], counts: dict[str, int], shapes: list[Shapes]) -> dict[str, Any]:
    """Read a shard once, frames left compressed; adds to the three totals and returns its record in `meta.json`."""
    with open_shard(shard) as file:
        for group in range(file.num_row_groups):
            images, state = image_columns(file.schema_arrow), ["state"] * ("state" in file.schema_arrow.names)
            names = ["task", "step", "is_final", "action", "ee_state", *images.values(), *state]
            table = columns(file, shard, group, names)
            where = f"{shard}, episode {group}"
            check_rows(table, where)
            values = table_actions(table, where)
            check_trajectory(values, table_vectors(table, "ee_state", where), where)
            task = table["task"][0].as_py()
            counts[task] = counts.get(task, 0) + 1
            actions += list(values)
            sizes = {camera: _frame_size(table[name][0].as_py()["bytes"]) for camera, name in images.items()}
            found = Shapes(sizes, len(table["state"][0].as_py()) if state else None)
            if found not in shapes:
                shapes.append(found)
        return {
            "name": shard.name,
            "trajectories": file.num_row_groups,
            "rows": file.metadata.num_rows,
            "bytes": shard.stat().st_size,
        }


def columns(file: pq.ParquetFile, shard: Path, group: int, names: list[str]) -> pa.Table:
    """Some columns of one episode."""
    try:
        return file.read_row_group(group, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise damaged(shard, error) from error


def _frame_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width
