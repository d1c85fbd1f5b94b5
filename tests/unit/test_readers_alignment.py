"""Which frame belongs to which row of a LeRobot dataset: by time, by the video's own clock, or not at all.

What a row must see is known from what was written: LeRobot 0.4.4 itself takes the frame nearest to
`from_timestamp + timestamp`, within 1e-4 s (`LeRobotDataset._query_videos`, `decode_video_frames`), and finds rows by
their `episode_index` in all files under `data/` (`load_nested_dataset`).
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folder import FPS, SIZE, LeRobotFolder, png

from reachrl.demos.readers import read_trajectories
from reachrl.demos.readers.video import frames_at
from reachrl.errors import ConfigError, StorageError
from reachrl.report.video import write_video

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
CAMERA = "videos/observation.images.front"


def change_table(path, change):
    """Let `change` edit a Parquet file as a dict of columns."""
    columns = pq.read_table(path).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), path)


def keep_rows(written, keep):
    """Drop the rows of every episode whose numbers `keep` refuses, as a filter of the table does; videos stay."""
    kept = [[i for i in range(length) if keep(i)] for length in written.lengths]
    tables = [written.rows(number).take(rows) for number, rows in enumerate(kept)]
    if written.version == 2:
        for number, table in enumerate(tables):
            pq.write_table(table, written.root / f"data/chunk-000/episode_{number:06d}.parquet")
        lines = [json.loads(line) for line in (written.root / "meta/episodes.jsonl").read_text().splitlines()]
        for line, table in zip(lines, tables, strict=True):
            line["length"] = len(table)
        (written.root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        pq.write_table(pa.concat_tables(tables), written.root / "data/chunk-000/file-000.parquet")
        change_table(written.root / EPISODES, lambda c: c.update(length=[len(table) for table in tables]))
    return kept


def assert_frames(trajectory, expected):
    """Equal up to what coding loses; neighbouring frames are 21 grey levels apart."""
    assert trajectory.frames.shape == expected.shape
    assert np.abs(trajectory.frames.astype(int) - expected).max() <= 6


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("keep", [lambda i: i % 2 == 0, lambda i: i not in (2, 3), lambda i: i >= 2])
def test_dropped_rows_leave_the_others_with_their_frames(tmp_path, version, keep):
    written = LeRobotFolder(tmp_path / "data", version, "video")
    kept = keep_rows(written, keep)
    for number, trajectory in enumerate(read_trajectories(written.root)):
        assert_frames(trajectory, written.images[number][kept[number]])
        np.testing.assert_array_equal(trajectory.ee_state[:, :3], written.states[number][kept[number], :3])
        np.testing.assert_array_equal(trajectory.actions, written.actions[number][kept[number]][:-1])


@pytest.mark.parametrize("version", [2, 3])
def test_a_table_at_a_third_of_the_videos_rate_takes_every_third_frame(tmp_path, version):
    written = LeRobotFolder(tmp_path / "data", version, "video")
    dense = [np.repeat(images, 3, axis=0) for images in written.images]
    for frames in dense:
        frames[1::3] = frames[2::3] = 255  # seen by nobody
    if version == 2:
        for number, frames in enumerate(dense):
            path = written.root / f"videos/chunk-000/{written.camera}/episode_{number:06d}.mp4"
            write_video(path, frames, fps=3 * FPS, hold_last_s=0)
    else:
        path = written.root / f"{CAMERA}/chunk-000/file-000.mp4"
        write_video(path, np.concatenate(dense), fps=3 * FPS, hold_last_s=0)
    for number, trajectory in enumerate(read_trajectories(written.root)):
        assert_frames(trajectory, written.images[number])


def test_rows_are_found_in_whatever_file_holds_them(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 3, "video")  # every record points at file-000
    pq.write_table(written.rows(0), written.root / "data/chunk-000/file-003.parquet")
    (written.root / "data/chunk-001").mkdir()
    pq.write_table(written.rows(1), written.root / "data/chunk-001/file-000.parquet")
    (written.root / "data/chunk-000/file-000.parquet").unlink()
    read = list(read_trajectories(written.root))
    assert [trajectory.start.index for trajectory in read] == [0, 1]
    for number, trajectory in enumerate(read):
        np.testing.assert_array_equal(trajectory.actions, written.actions[number][:-1])
        assert_frames(trajectory, written.images[number])
    shutil.copy(written.root / "data/chunk-001/file-000.parquet", written.root / "data/chunk-000/file-004.parquet")
    with pytest.raises(StorageError, match=r"chunk-001/file-000.parquet: episode 1 lies in .*file-004.parquet too"):
        next(read_trajectories(written.root))


@pytest.mark.parametrize("value", ["absent", None, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("key", ["from_timestamp", "to_timestamp", "file_index", "chunk_index"])
def test_where_an_episode_lies_has_no_default(tmp_path, key, value):
    written = LeRobotFolder(tmp_path / "data", 3, "video")

    def change(columns):
        if value == "absent":
            del columns[f"{CAMERA}/{key}"]
        else:
            columns[f"{CAMERA}/{key}"][1] = value

    change_table(written.root / EPISODES, change)
    number = 0 if value == "absent" else 1
    with pytest.raises(StorageError, match=rf"record of episode {number}: {CAMERA}/{key} is .*expected a number"):
        read_trajectories(written.root)


@pytest.mark.parametrize("key", ["episode_index", "length", "data/file_index", "data/chunk_index"])
def test_whole_numbers_of_the_metadata_are_whole(tmp_path, key):
    root = LeRobotFolder(tmp_path / "data", 3, "image").root
    whole = (root / EPISODES).read_bytes()
    for value, said in ((float("nan"), "nan"), (None, "None"), (1.5, "1.5")):
        change_table(root / EPISODES, lambda c, value=value: c.update({key: [float(c[key][0]), value]}))
        with pytest.raises(StorageError, match=rf"{key} is {said}, expected a (whole )?number"):
            read_trajectories(root)
        (root / EPISODES).write_bytes(whole)
    change_table(root / EPISODES, lambda c: c.update({key: [float(x) for x in c[key]]}))  # as beside a missing one
    assert len(list(read_trajectories(root))) == 2


@pytest.mark.parametrize("key", ["data_path", "video_path", "chunks_size"])
def test_what_the_format_demands_of_info_json_has_no_default(tmp_path, key):
    root = LeRobotFolder(tmp_path / "data", 2, "video").root
    info = json.loads((root / "meta/info.json").read_text())
    for value in (None, "absent"):
        changed = {k: v for k, v in info.items() if k != key} | ({} if value == "absent" else {key: value})
        (root / "meta/info.json").write_text(json.dumps(changed))
        with pytest.raises(StorageError, match=rf"info.json: {key} is "):
            read_trajectories(root)
    (root / "meta/info.json").write_text(json.dumps(info | {"fps": float("nan")}))
    with pytest.raises(StorageError, match="no `fps`"):
        read_trajectories(root)


def test_frames_of_a_neighbour_are_not_taken(tmp_path):
    """Episode 0 is 0.6 s long; what is said of it must not reach into episode 1."""
    written = LeRobotFolder(tmp_path / "data", 3, "video")
    path = written.root / EPISODES
    whole = path.read_bytes()
    change_table(path, lambda c: c.update({f"{CAMERA}/from_timestamp": [0.1, 0.6]}))
    with pytest.raises(StorageError, match=r"episode 0, row 5: .*at 0.600000 s .*file-000.mp4, .*end at 0.6 s"):
        next(read_trajectories(written.root))
    path.write_bytes(whole)
    change_table(path, lambda c: c.update({f"{CAMERA}/to_timestamp": [0.7, 1.5]}))
    with pytest.raises(StorageError, match=r"episode 0 \(0 to 0.7 s\) and episode 1 \(0.6 to 1.5 s\) claim the same"):
        read_trajectories(written.root)
    path.write_bytes(whole)
    change_table(path, lambda c: c.update({f"{CAMERA}/to_timestamp": [0.6, 0.3]}))
    with pytest.raises(StorageError, match=r"episode 1: .*to_timestamp 0.3 is not after .*from_timestamp 0.6"):
        read_trajectories(written.root)
    path.write_bytes(whole)
    change_table(path, lambda c: c.update(episode_index=[0, 0]))
    with pytest.raises(StorageError, match="episode 0 is listed 2 times"):
        read_trajectories(written.root)


def rows_changed(written, **columns):
    """Both episodes' rows with other columns; None leaves one out."""
    table = pa.concat_tables([written.rows(0), written.rows(1)])
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.remove_column(place) if values is None else table.set_column(place, name, pa.array(values))
    pq.write_table(table, written.root / "data/chunk-000/file-000.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"timestamp": None}, "no column 'timestamp'"),
        ({"frame_index": None}, "no column 'frame_index'"),
        ({"timestamp": [k / FPS + 0.004 for k in range(6)]}, "contradict each other"),
        ({"timestamp": [(k + 1) / FPS for k in range(6)]}, "contradict each other"),  # another frame each
        ({"timestamp": [k / 14 for k in range(6)]}, r"row 1: its frame belongs at 0.071429 s .*nearest .* at 0.1"),
        ({"timestamp": [k * 1.002 / FPS for k in range(6)]}, r"row 1: .*at 0.100200 s .*at most 0.0002 s"),
        ({"timestamp": [0.0, 0.1, 0.2, float("nan"), 0.4, 0.5]}, "must grow"),
        ({"timestamp": [0.0, 0.1, 0.3, 0.2, 0.4, 0.5]}, "must grow"),
        ({"frame_index": [0, 1, 2, 2, 4, 5]}, "must grow"),
        ({"frame_index": [0, 1, 2, 3, 4, None]}, "frame_index holds .*; expected whole numbers"),
        ({"episode_index": [0, 0, 0, 1, 0, 0]}, "do not lie together|rows of episode"),
        ({"episode_index": [0.0, 0.0, 0.0, float("nan"), 0.0, 0.0]}, "episode_index holds"),
        ({"task_index": [0, 0, 0, 1, 1, 1]}, "several sentences \\(close the drawer; open the drawer\\)"),
    ],
)
def test_rows_that_contradict_one_another_or_the_video_are_refused(tmp_path, columns, message):
    written = LeRobotFolder(tmp_path / "data", 3, "video")
    second = {
        "timestamp": [k / FPS for k in range(9)],
        "frame_index": list(range(9)),
        "episode_index": [1] * 9,
        "task_index": [1] * 9,
    }
    rows_changed(
        written, **{name: values if values is None else values + second[name] for name, values in columns.items()}
    )
    with pytest.raises((StorageError, ConfigError), match=message):
        list(read_trajectories(written.root))


@pytest.mark.parametrize("name", ["action", "observation.state"])
def test_a_row_that_is_not_finite_is_refused_with_episode_and_step(tmp_path, name):
    written = LeRobotFolder(tmp_path / "data", 3, "image")
    values = [row.tolist() for rows in (written.actions if name == "action" else written.states) for row in rows]
    values[6 + 4][1] = float("nan")
    rows_changed(written, **{name: values})
    what = "action" if name == "action" else "ee_state"
    with pytest.raises(StorageError, match=rf"episode 1, step 4: {what}.* is nan in dimension 1"):
        list(read_trajectories(written.root))


def test_success_that_is_not_known_is_refused(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 3, "image", success=[True, False])
    rows_changed(written, **{"next.success": [False] * 5 + [True] + [False] * 4 + [None] + [False] * 4})
    with pytest.raises(StorageError, match=r"episode 1: next.success is missing in row 4"):
        list(read_trajectories(written.root))


def test_frames_are_the_nearest_by_the_videos_own_clock(tmp_path):
    levels = (np.arange(120) * 37) % 220 + 20
    film = np.broadcast_to(levels[:, None, None, None], (120, SIZE, SIZE, 3)).astype(np.uint8)
    path = tmp_path / "film.mp4"
    write_video(path, film, fps=24, hold_last_s=0)
    for numbers in ([0, 1, 2], [5, 50, 119], [119], [7, 8, 30, 31]):
        frames = frames_at(path, np.array(numbers) / 24 + 9e-5, where="here")
        assert np.abs(frames.astype(int).mean((1, 2, 3)) - levels[numbers]).max() < 6
    with pytest.raises(StorageError, match=r"here, row 1: .*at 0.043000 s .*nearest frame lies at 0.041667 s"):
        frames_at(path, np.array([0.0, 0.043]), where="here")
    with pytest.raises(StorageError, match=r"here, row 1: .*which the row before has taken"):
        frames_at(path, np.array([0.0, 5e-5]), where="here")
    with pytest.raises(StorageError, match=r"here, row 0: .*at 5.000000 s .*nearest frame lies at 4.958333 s"):
        frames_at(path, np.array([5.0]), where="here")


def test_a_picture_in_a_row_is_turned_as_its_exif_says(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 2, "image")
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    frame[: SIZE // 2] = 200  # stored bright above; orientation 3 is half a turn
    cells = [png(frame, orientation=3)] * 6
    path = written.root / "data/chunk-000/episode_000000.parquet"
    change_table(path, lambda columns: columns.update({written.camera: cells}))
    images = next(read_trajectories(written.root)).frames
    assert images[0, SIZE - 1, 0].tolist() == [200] * 3 and images[0, 0, 0].tolist() == [0] * 3
    change_table(path, lambda columns: columns.update({written.camera: [png(np.zeros((8, 8), np.uint16))] * 6}))
    with pytest.raises(StorageError, match="mode I;16: expected 8 bits a channel"):
        next(read_trajectories(written.root))
