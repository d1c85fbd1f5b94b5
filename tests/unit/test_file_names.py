"""Names that users and data sets choose, as files: no two share one, none leaves its folder, all fit."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reachrl.demos.collect import shard_name
from reachrl.demos.shard import ShardWriter, iter_shard
from reachrl.report.embed import films_by_task
from reachrl.report.report import write_report
from reachrl.report.video import read_video, write_video
from reachrl.run.file_names import file_name
from reachrl.types import Start, Trajectory

AWKWARD = (
    *("open/close door", "open_close door", "open close door", "open_close_door", "Open_close_door"),
    *("../x", "..", ".", "", "/etc/passwd", ".hidden", "x\0y", "a\nb", "con", "x.mp4", "~"),
    *("\u00e9", "e\u0301", "\ud83d\ude00" * 100, "\u65e5\u672c\u8a9e" * 100, "a" * 300, "a" * 301, "A" * 300, "\udcff"),
)
FRAMES = np.zeros((2, 16, 16, 3), np.uint8)


def seen_by_any_file_system(name: str) -> str:
    """As a file system compares names that ignores case and normalises Unicode."""
    return unicodedata.normalize("NFD", name).casefold()


@given(st.lists(st.text(max_size=300) | st.sampled_from(AWKWARD), unique=True, max_size=20))
def test_names_never_share_a_file_and_always_fit_in_their_folder(names):
    files = [file_name(name, ".parquet") for name in names]
    assert len({seen_by_any_file_system(file) for file in files}) == len(names)
    for file in files:
        assert Path(file).name == file and "\0" not in file and not file.startswith(".")
        assert file.endswith(".parquet") and len(f"before_{file}.tmp-{'x' * 50}".encode()) <= 255


@pytest.mark.parametrize("name", ["door-close", "open_the_middle_drawer", "v1.2", "0"])
def test_plain_names_stay_as_they_are(name):
    assert file_name(name, ".mp4") == f"{name}.mp4"


def test_awkward_names_are_all_different_and_writable(tmp_path):
    for name in AWKWARD:
        (tmp_path / file_name(name, ".json")).write_text(ascii(name))
    assert len(list(tmp_path.iterdir())) == len(AWKWARD)


def trajectory(task: str, value: float) -> Trajectory:
    return Trajectory(
        start=Start(task, "train", 0),
        instruction=task,
        images={"camera": FRAMES},
        actions=np.full((1, 4), value, np.float32),
        ee_state=np.zeros((2, 4), np.float32),
        success=True,
        source="expert",
    )


def test_demonstrations_of_tasks_with_like_names_are_kept_apart(tmp_path):
    tasks = ("open/close door", "open_close door")
    for value, task in enumerate(tasks):
        with ShardWriter(tmp_path / shard_name(task)) as writer:
            writer.write(trajectory(task, value))
    for value, task in enumerate(tasks):
        (read,) = iter_shard(tmp_path / shard_name(task))
        assert read.start.task == task and read.actions.tolist() == [[value] * 4]


def test_films_are_shown_under_the_names_of_their_tasks(tmp_path):
    """Those of earlier versions too, whose files bore the name itself."""
    films = {file_name("Open door"): 1, "KITCHEN_1": 2, "plain": 3, "unknown": 4}
    found = films_by_task(films, ["plain", "KITCHEN_1", "Open door", "not filmed"])
    assert list(found.items()) == [("plain", 3), ("KITCHEN_1", 2), ("Open door", 1), ("unknown", 4)]


def test_a_report_names_the_task_and_not_its_file(tmp_path):
    write_video(tmp_path / "videos" / f"before_{file_name('Open/close door', '.mp4')}", FRAMES)
    (tmp_path / "eval").mkdir()
    record = {"greedy": {"k": 0, "n": 1, "per_task": {"Open/close door": {"k": 0, "n": 1, "rate": 0.0}}}}
    for when in ("before", "after"):
        (tmp_path / "eval" / f"{when}.json").write_text(json.dumps(record))
    page = write_report(tmp_path).read_text()
    assert "<video" in page and "Open/close door" in page and "Open_close_door" not in page


# --- colons -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["2026-11-27T14:05", "run:1", "file:x", "https:", "pipe:0", "concat:a|b"])
def test_a_colon_in_a_relative_path_is_no_protocol(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    path = write_video(Path(folder) / "film.mp4", FRAMES, hold_last_s=0.0)
    assert path.stat().st_size and read_video(path).shape == (2, 16, 16, 3)
    with ShardWriter(Path(folder) / "a.parquet") as writer:
        writer.write(trajectory("t", 1.0))
    assert [each.start.task for each in iter_shard(Path(folder) / "a.parquet")] == ["t"]
    assert sorted(found.name for found in Path(folder).iterdir()) == ["a.parquet", "film.mp4"]
