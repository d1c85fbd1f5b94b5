"""Detects the format of trajectories at a path and reads them."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from reachrl.demos.readers.end_effector import StateColumns
from reachrl.demos.readers.frames import VIDEO_SUFFIXES
from reachrl.demos.readers.lerobot import read_lerobot
from reachrl.demos.readers.lerobot_index import INFO
from reachrl.demos.readers.libero_hdf5 import HDF5_SUFFIXES, read_libero_hdf5
from reachrl.demos.readers.video_file import read_video_file
from reachrl.demos.shard import iter_shard, open_shard
from reachrl.demos.store import META_FILE, iter_trajectories
from reachrl.errors import ConfigError
from reachrl.types import Trajectory

UNDERSTOOD = (
    "a run folder (config.json), a trajectory store (meta.json) or one of its .parquet shards, LIBERO's .hdf5 files or "
    f"a folder of them, a LeRobot dataset ({INFO}) of version 2 or 3, a video ({' '.join(VIDEO_SUFFIXES)})"
)


def read_trajectories(
    path: Path | str,
    *,
    instruction: str | None = None,
    camera: str | None = None,
    state: StateColumns | None = None,
) -> Iterator[Trajectory]:
    """Read trajectories from any format that is understood, one in memory at a time.

    A run folder gives its demonstrations, then the episodes that its reward model was fitted on.

    Args:
        path: see `UNDERSTOOD`.
        instruction: the sentence of a video; elsewhere it stands in for the stored ones.
        camera: which camera, where a format has several; None: its usual one.
        state: where a LeRobot dataset keeps the end effector; None: found by the names of its columns.

    Returns:
        An iterator; damage that shows only in a file's inside is raised while it runs.

    Raises:
        ConfigError: there is nothing at the path, nothing that is understood, or an option is lacking or wrong.
        StorageError: a file is missing, truncated or damaged.
        MissingExtra: the package that reads the format is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: there is nothing here. Expected {UNDERSTOOD}.")
    path = path.absolute()  # libraries take `run:1/x` for a URI
    if path.is_file():
        return _file(path, instruction, camera)
    if (path / INFO).is_file():
        return read_lerobot(path, instruction=instruction, camera=camera, state=state)
    if _is_store(path):
        return _said(iter_trajectories(path), instruction)
    if (path / "config.json").is_file():
        return _said(_run(path), instruction)
    if any(entry.suffix in HDF5_SUFFIXES for entry in path.iterdir()):
        return read_libero_hdf5(path, instruction=instruction, camera=camera)
    hint = ""
    if any(path.glob("*.parquet")):
        hint = f" It holds .parquet files but no {META_FILE}: name one of them, or let the demos stage finish."
    raise ConfigError(f"{path}: this folder is not understood.{hint} Expected {UNDERSTOOD}.")


def _file(path: Path, instruction: str | None, camera: str | None) -> Iterator[Trajectory]:
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[], Iterator[Trajectory]]] = {
        ".parquet": lambda: _said(_shard(path), instruction),
        **{kind: lambda: read_libero_hdf5(path, instruction=instruction, camera=camera) for kind in HDF5_SUFFIXES},
        **{kind: lambda: read_video_file(path, instruction=instruction) for kind in VIDEO_SUFFIXES},
    }
    if suffix not in readers:
        raise ConfigError(f"{path}: a file of kind {suffix or 'none'} is not understood. Expected {UNDERSTOOD}.")
    return readers[suffix]()


def _shard(path: Path) -> Iterator[Trajectory]:
    open_shard(path).close()  # a file that is no shard is an error before the first trajectory is requested
    return iter_shard(path)


def _is_store(folder: Path) -> bool:
    """Whether the folder's `meta.json` is that of a store; other programs write files of this name too."""
    try:
        return "format_version" in json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _run(folder: Path) -> Iterator[Trajectory]:
    """The demonstrations of a run and the rollouts its reward model was fitted on, whichever are there."""
    demos, rollouts = folder / "demos", sorted((folder / "reward_model" / "rollouts").glob("*.parquet"))
    if not _is_store(demos) and not rollouts:
        raise ConfigError(
            f"{folder}: a config.json, but neither a complete demos/ nor reward_model/rollouts/*.parquet beside it. "
            "If this is a run folder, run its demos stage first."
        )
    demonstrations = iter_trajectories(demos) if _is_store(demos) else ()
    return itertools.chain(demonstrations, *(iter_shard(path) for path in rollouts))


def _said(trajectories: Iterator[Trajectory], instruction: str | None) -> Iterator[Trajectory]:
    """The trajectories with `instruction` replaced, if one was given."""
    if instruction is None:
        return trajectories
    return (replace(trajectory, instruction=instruction) for trajectory in trajectories)
