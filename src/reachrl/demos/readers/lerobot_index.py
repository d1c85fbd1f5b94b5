"""The `meta` folder of a LeRobot dataset: features, tasks, and the files of each episode.

Version 2 keeps one Parquet file and one video a camera for each episode; version 3 puts many episodes into one file
and says in `meta/episodes` which, and from which second of the video on. What a key must say is never assumed: LeRobot
itself has no defaults for them.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reachrl.demos.damage import unreadable
from reachrl.errors import ConfigError, StorageError

INFO = "meta/info.json"
_META = "Fetch the dataset's meta folder again."
_OVERLAP_S = 1e-3  # by which two episodes of a video may share its time: rounding of their lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One episode as the `meta` folder lists it."""

    index: int
    length: int  # frames
    tasks: tuple[str, ...]
    data: Path  # in version 3 a hint: published datasets point at the wrong file
    video: Path | None  # of the chosen camera; None where frames lie in the Parquet file
    video_start: float  # seconds
    video_stop: float  # seconds; infinite where the video holds nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class LeRobotIndex:
    """The facts of a dataset that are needed to read its episodes."""

    folder: Path
    many_in_a_file: bool  # version 3: any file under data/ may hold an episode
    features: Mapping[str, Mapping[str, Any]]
    camera: str
    fps: float
    tasks: Mapping[int, str]
    episodes: tuple[EpisodeRecord, ...]  # in the order in which the files are read


def read_index(folder: Path, *, camera: str | None) -> LeRobotIndex:
    """Read the `meta` folder of a dataset of version 2.0, 2.1 or 3.

    Args:
        folder: the dataset's root.
        camera: an image or video feature; None: the first that is no depth map.

    Raises:
        StorageError: a file of `meta` is missing, damaged, without a key that is needed, or contradicts itself.
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
    fps = info.get("fps")
    if not isinstance(features, dict) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise StorageError(f"{folder / INFO}: no `features` or no `fps`. {_META}")
    chosen = _camera(folder, features, camera)
    paths = _Paths(folder, info, major, chosen if features[chosen].get("dtype") == "video" else None)
    rows = _lines(folder / "meta/episodes.jsonl") if major == 2 else _episodes_3(folder)
    episodes = [paths.record(row) for row in rows]
    _check(folder, episodes)
    stated = info.get("total_episodes")
    if isinstance(stated, int) and stated > len(episodes):
        raise StorageError(
            f"{folder / 'meta'}: {INFO} states {stated} episodes (total_episodes), {len(episodes)} are listed; the "
            f"others would be left out. {_META}"
        )
    return LeRobotIndex(
        folder=folder,
        many_in_a_file=major == 3,
        features=features,
        camera=chosen,
        fps=float(fps),
        tasks=_tasks_2(folder) if major == 2 else _tasks_3(folder),
        episodes=tuple(sorted(episodes, key=lambda episode: episode.index)),
    )


def _check(folder: Path, episodes: list[EpisodeRecord]) -> None:
    """Refuse episodes that are listed twice, or that claim the same seconds of a video."""
    numbers = [episode.index for episode in episodes]
    if twice := [number for number, count in Counter(numbers).items() if count > 1]:
        raise StorageError(f"{folder / 'meta'}: episode {twice[0]} is listed {numbers.count(twice[0])} times. {_META}")
    placed = sorted(
        (each for each in episodes if each.video is not None), key=lambda each: (each.video, each.video_start)
    )
    for one, two in itertools.pairwise(placed):
        if one.video == two.video and two.video_start < one.video_stop - _OVERLAP_S:
            spans = [f"episode {each.index} ({each.video_start:g} to {each.video_stop:g} s)" for each in (one, two)]
            raise StorageError(
                f"{folder / 'meta'}: {' and '.join(spans)} claim the same frames of {one.video}. {_META}"
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
    """Turns an episode's row into the paths and times of its rows and frames."""

    def __init__(self, folder: Path, info: dict[str, Any], major: int, video_key: str | None) -> None:
        self._folder, self._info, self._major, self._video_key = folder, info, major, video_key

    def record(self, row: Mapping[str, Any]) -> EpisodeRecord:
        """One episode of the list.

        Raises:
            StorageError: a key is missing, or is not what it must be.
        """
        where = f"{self._folder / 'meta'}: an episode's record"
        index = _whole(row, "episode_index", where)
        where = f"{self._folder / 'meta'}: the record of episode {index}"
        start, stop = self._seconds(row, where)
        return EpisodeRecord(
            index=index,
            length=_whole(row, "length", where),
            tasks=tuple(map(str, tasks)) if isinstance(tasks := row.get("tasks"), list) else (),
            data=self._fill("data_path", row, "data", where),
            video=None
            if self._video_key is None
            else self._fill("video_path", row, f"videos/{self._video_key}", where),
            video_start=start,
            video_stop=stop,
        )

    def _seconds(self, row: Mapping[str, Any], where: str) -> tuple[float, float]:
        """From when to when the video shows the episode."""
        if self._video_key is None or self._major == 2:
            return 0.0, math.inf
        keys = [f"videos/{self._video_key}/{key}" for key in ("from_timestamp", "to_timestamp")]
        start, stop = (_number(row, key, where) for key in keys)
        if stop <= start:
            raise StorageError(f"{where}: {keys[1]} {stop:g} is not after {keys[0]} {start:g}. {_META}")
        return start, stop

    def _fill(self, template: str, row: Mapping[str, Any], kind: str, where: str) -> Path:
        pattern = self._info.get(template)
        if not isinstance(pattern, str):
            raise StorageError(f"{self._folder / INFO}: {template} is {pattern!r}, expected a pattern. {_META}")
        index = _whole(row, "episode_index", where)
        places: dict[str, Any] = {"episode_index": index, "video_key": self._video_key}
        if self._major == 3:
            places |= {key: _whole(row, f"{kind}/{key}", where) for key in ("chunk_index", "file_index")}
        else:
            size = _whole(self._info, "chunks_size", str(self._folder / INFO))
            places["episode_chunk"] = index // max(1, size)
        try:
            relative = PurePosixPath(pattern.format(**places))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{self._folder / INFO}: {template} = {pattern!r} cannot be filled in ({error!r})."
            ) from error
        if relative.is_absolute() or ".." in relative.parts:
            raise StorageError(f"{self._folder / INFO}: {template} leads out of the dataset's folder: {relative}.")
        return self._folder / relative


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number from 0 on."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        state = f"is {value!r}" if key in row else f"is missing (there are {', '.join(sorted(map(str, row)))})"
        raise StorageError(f"{where}: {key} {state}, expected a number from 0 on. {_META}")
    return float(value)


def _whole(row: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number from 0 on; tables that lacked one elsewhere hold them as floating-point numbers."""
    value = _number(row, key, where)
    if value != int(value):
        raise StorageError(f"{where}: {key} is {value:g}, expected a whole number. {_META}")
    return int(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        return _object(path, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        # JSON may hold U+2028 and its like, at which `splitlines` would cut.
        return [_object(path, line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _object(path: Path, text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise StorageError(f"{path}: {text.strip()[:40]} where an object {{...}} was expected. {_META}")
    return value


def _damaged(path: Path, error: Exception) -> StorageError:
    return unreadable(path, error, remedy=_META, damage="unreadable")


def _table(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _tasks_2(folder: Path) -> dict[int, str]:
    path = folder / "meta/tasks.jsonl"
    return _tasks(_lines(path), "task", path) if path.exists() else {}


def _tasks_3(folder: Path) -> dict[int, str]:
    """The sentences, which pandas wrote as the table's index: the one column that is not `task_index`."""
    path = folder / "meta/tasks.parquet"
    if not path.exists():
        return {}
    table = _table(path)
    sentences = [name for name in table.column_names if name in ("task", "__index_level_0__")]
    if not sentences or "task_index" not in table.column_names:
        raise StorageError(f"{path}: columns {', '.join(table.column_names)}; expected task and task_index.")
    return _tasks(table.to_pylist(), sentences[0], path)


def _tasks(rows: list[dict[str, Any]], sentence: str, path: Path) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for row in rows:
        number = _whole(row, "task_index", str(path))
        if not isinstance(row.get(sentence), str) or tasks.get(number, row[sentence]) != row[sentence]:
            raise StorageError(f"{path}: task {number} is {row.get(sentence)!r}; expected one sentence. {_META}")
        tasks[number] = row[sentence]
    return tasks


def _episodes_3(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise StorageError(f"{folder / 'meta/episodes'}: no Parquet files. {_META}")
    tables = [_table(file) for file in files]
    return [
        row
        for table in tables
        for row in table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
    ]
