"""An episode as rows of a table, with its frames as PNG, and back.

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

`pandas.read_parquet(shard)` and `datasets.load_dataset("parquet", data_files="folder/*.parquet")` open shards of such
rows without this package.
"""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt8
from PIL import Image

from reachrl.demos.checks import check_finite, check_rows, check_trajectory
from reachrl.errors import StorageError
from reachrl.types import Start, Trajectory

FORMAT_VERSION = 2

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS: list[tuple[str, pa.DataType]] = [
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


def schema_of(cameras: Iterable[str], *, with_state: bool) -> pa.Schema:
    """The columns of a shard whose frames come from `cameras`, in order."""
    columns = [(f"image.{camera}", _IMAGE) for camera in cameras] + COLUMNS + [("control_hz", pa.float32())]
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
    schema = schema_of(trajectory.images, with_state=state is not None)
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
    column = {name: table[name].to_pylist() for name, _ in COLUMNS if name not in ("action", "ee_state")}
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
