"""What the `meta` folder of a LeRobot dataset says: features, tasks, and in which files each episode lies.

Version 2 keeps one Parquet file and one video a camera for each episode; version 3 puts many episodes into one file
and says in `meta/episodes` which, and from which second of the video on.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reachrl.errors import ConfigError, StorageError

INFO = "meta/info.json"
_DATA_PATHS = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
_VIDEO_PATHS = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One episode as the `meta` folder lists it."""

    index: int
    length: int  # frames
    tasks: tuple[str, ...]
    data: Path
    video: Path | None  # of the chosen camera; None where frames lie in the Parquet file
    video_start: float  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LeRobotIndex:
    """The facts of a dataset that are needed to read its episodes."""

    folder: Path
    features: Mapping[str, Mapping[str, Any]]
    fps: float
    camera: str
    tasks: Mapping[int, str]
    episodes: tuple[EpisodeRecord, ...]  # in the order in which the files are read


def read_index(folder: Path, *, camera: str | None) -> LeRobotIndex:
    """Read the `meta` folder of a dataset of version 2.0, 2.1 or 3.

    Args:
        folder: the dataset's root.
        camera: an image or video feature; None: the first that is no depth map.

    Raises:
        StorageError: a file of `meta` is missing, damaged or without a key that is needed.
        ConfigError: the version is another, or there is no such camera.
    """
    info = _json(folder / INFO)
    version = str(info.get("codebase_version", ""))
    major = {"v2": 2, "v3": 3}.get(version.partition(".")[0])
    if major is None:
        raise ConfigError(
            f"{folder / INFO}: codebase_version is {version!r}, understood are v2.0, v2.1 and v3.0. "
            "Convert the dataset with LeRobot's own scripts."
        )
    features = info.get("features")
    if not isinstance(features, dict) or not isinstance(info.get("fps"), int | float) or info["fps"] <= 0:
        raise StorageError(f"{folder / INFO}: no `features` or no `fps`. Fetch the dataset's meta folder again.")
    chosen = _camera(folder, features, camera)
    is_video = features[chosen].get("dtype") == "video"
    listed = _episodes_2(folder) if major == 2 else _episodes_3(folder, chosen if is_video else None)
    paths = _Paths(folder, info, major, chosen if is_video else None)
    episodes = [_record(row, paths, folder) for row in listed]
    return LeRobotIndex(
        folder=folder,
        features=features,
        fps=float(info["fps"]),
        camera=chosen,
        tasks=_tasks_2(folder) if major == 2 else _tasks_3(folder),
        episodes=tuple(sorted(episodes, key=lambda episode: episode.index)),
    )


def _camera(folder: Path, features: dict[str, Any], wanted: str | None) -> str:
    cameras = [key for key, feature in features.items() if feature.get("dtype") in ("image", "video")]
    found = wanted or next((key for key in cameras if not _is_depth(features[key])), None)
    if found not in cameras:
        what = f"no camera {wanted!r}" if wanted else "no camera"
        raise ConfigError(f"{folder / INFO}: {what} among the features. There are: {', '.join(cameras) or 'none'}.")
    return found


def _is_depth(feature: dict[str, Any]) -> bool:
    facts = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(facts.get("is_depth_map") or facts.get("video.is_depth_map"))


class _Paths:
    """Turns an episode's row into the paths of its files."""

    def __init__(self, folder: Path, info: dict[str, Any], major: int, video_key: str | None) -> None:
        self._folder, self._major, self._video_key = folder, major, video_key
        self._chunk = int(info.get("chunks_size") or 1000)
        self._templates = {
            "data_path": info.get("data_path") or _DATA_PATHS[major],
            "video_path": info.get("video_path") or _VIDEO_PATHS[major],
        }

    def data(self, row: Mapping[str, Any]) -> Path:
        """The Parquet file with the episode's rows."""
        return self._fill("data_path", row, "data")

    def video(self, row: Mapping[str, Any]) -> Path | None:
        """The video with the episode's frames; None where they lie in the Parquet file."""
        return None if self._video_key is None else self._fill("video_path", row, f"videos/{self._video_key}")

    def _fill(self, template: str, row: Mapping[str, Any], kind: str) -> Path:
        index = int(row["episode_index"])
        places = {"episode_index": index, "episode_chunk": index // self._chunk, "video_key": self._video_key}
        if self._major == 3:
            places |= {key: int(row[f"{kind}/{key}"]) for key in ("chunk_index", "file_index")}
        try:
            relative = PurePosixPath(self._templates[template].format(**places))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{self._folder / INFO}: {template} = {self._templates[template]!r} cannot be filled in ({error!r})."
            ) from error
        if relative.is_absolute() or ".." in relative.parts:
            raise StorageError(f"{self._folder / INFO}: {template} leads out of the dataset's folder: {relative}.")
        return self._folder / relative


def _record(row: Mapping[str, Any], paths: _Paths, folder: Path) -> EpisodeRecord:
    try:
        return EpisodeRecord(
            index=int(row["episode_index"]),
            length=int(row["length"]),
            tasks=tuple(row.get("tasks") or ()),
            data=paths.data(row),
            video=paths.video(row),
            video_start=float(row.get("video_start") or 0.0),
        )
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{folder / 'meta'}: an episode's record is incomplete ({error!r}); it has {', '.join(sorted(row))}. "
            "Fetch the dataset's meta folder again."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StorageError:
    state = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
    return StorageError(f"{path}: {state}. Fetch the dataset's meta folder again.")


def _table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _tasks_2(folder: Path) -> dict[int, str]:
    path = folder / "meta/tasks.jsonl"
    return {int(row["task_index"]): str(row["task"]) for row in _lines(path)} if path.exists() else {}


def _tasks_3(folder: Path) -> dict[int, str]:
    """The sentences, which pandas wrote as the table's index: the one column that is not `task_index`."""
    path = folder / "meta/tasks.parquet"
    if not path.exists():
        return {}
    table = _table(path)
    sentences = [name for name in table.column_names if name in ("task", "__index_level_0__")]
    if not sentences or "task_index" not in table.column_names:
        raise StorageError(f"{path}: columns {', '.join(table.column_names)}; expected task and task_index.")
    return dict(zip(table["task_index"].to_pylist(), table[sentences[0]].to_pylist(), strict=True))


def _episodes_2(folder: Path) -> list[dict[str, Any]]:
    return list(_lines(folder / "meta/episodes.jsonl"))


def _episodes_3(folder: Path, video_key: str | None) -> list[dict[str, Any]]:
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise StorageError(f"{folder / 'meta/episodes'}: no Parquet files. Fetch the dataset's meta folder again.")
    wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    if video_key is not None:
        wanted += [f"videos/{video_key}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
    rows: list[dict[str, Any]] = []
    for file in files:
        table = _table(file)
        rows += table.select([name for name in wanted if name in table.column_names]).to_pylist()
    return [row | {"video_start": row.get(f"videos/{video_key}/from_timestamp")} for row in rows]
