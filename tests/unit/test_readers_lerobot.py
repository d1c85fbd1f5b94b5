"""Reading LeRobot datasets: what is read equals what was written, and damage is told with its place."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folder import SIZE, LeRobotFolder

from reachrl.demos.readers import StateColumns, read_trajectories
from reachrl.demos.readers.end_effector import end_effector, flat_names, named_columns
from reachrl.demos.readers.video import frames_at
from reachrl.errors import ConfigError, StorageError
from reachrl.report.video import write_video
from reachrl.types import Start


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("version", [2, 3])
def test_lerobot_datasets_hold_what_was_written(tmp_path, version, kind):
    written = LeRobotFolder(tmp_path / "data", version, kind)
    read = list(read_trajectories(written.root))
    assert [t.start for t in read] == [Start("open-the-drawer", "train", 0), Start("close-the-drawer", "train", 1)]
    for number, trajectory in enumerate(read):
        assert trajectory.instruction == written.tasks[number]
        assert (trajectory.source, trajectory.success) == ("lerobot", True)
        np.testing.assert_array_equal(trajectory.actions, written.actions[number][:-1])
        np.testing.assert_array_equal(trajectory.ee_state[:, :3], written.states[number][:, :3])
        np.testing.assert_allclose(trajectory.ee_state[:, 3], np.linspace(1, 0, written.lengths[number]), atol=1e-6)
        difference = trajectory.frames.astype(int) - written.images[number]
        assert np.abs(difference).max() <= (0 if kind == "image" else 6)


def test_a_long_video_of_many_episodes_is_read_from_the_right_second(tmp_path):
    levels = (np.arange(300) * 37) % 220 + 20
    film = np.broadcast_to(levels[:, None, None, None], (300, SIZE, SIZE, 3)).astype(np.uint8)
    write_video(tmp_path / "film.mp4", film, fps=30, hold_last_s=0)
    for first, count in ((0, 40), (40, 7), (47, 200), (247, 53), (299, 1)):
        frames = frames_at(tmp_path / "film.mp4", (first + np.arange(count)) / 30, where="here")
        difference = frames.astype(int).mean((1, 2, 3)) - levels[first : first + count]
        assert len(frames) == count and np.abs(difference).max() < 6


def test_success_of_an_episode(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 3, "image", success=[True, False])
    assert [t.success for t in read_trajectories(written.root)] == [True, False]


def test_the_state_is_found_by_names_or_by_what_the_caller_says(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 3, "image", names=["state"], state="state")
    with pytest.raises(ConfigError, match=r"meaning of state \[8\] is unknown: its names are \['state'\].*0,1,2,6,7"):
        read_trajectories(written.root)
    said = next(read_trajectories(written.root, state=StateColumns(columns=(0, 1, 2, 6, 7))))
    np.testing.assert_array_equal(said.ee_state[:, :3], written.states[0][:, :3])
    one = StateColumns(columns=(2, 1, 0, 6), gripper_range=(0.0, 0.04))
    said = next(read_trajectories(written.root, state=one))
    np.testing.assert_array_equal(said.ee_state[:, :3], written.states[0][:, [2, 1, 0]])
    np.testing.assert_allclose(said.ee_state[:, 3], np.linspace(1, 0, 6), atol=1e-6)
    with pytest.raises(ConfigError, match="there is no column 8"):
        next(read_trajectories(written.root, state=StateColumns(columns=(0, 1, 2, 8))))
    with pytest.raises(ConfigError, match=r"no state 'pose'.*there are: state, action"):
        read_trajectories(written.root, state=StateColumns(feature="pose"))
    with pytest.raises(ConfigError, match="expected the positions of x, y, z and gripper"):
        StateColumns(columns=(0, 1, 2))
    with pytest.raises(ConfigError, match="must be different"):
        StateColumns(gripper_range=(1.0, 1.0))


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"], (0, 1, 2, 7)),
        ({"motors": ["x", "y", "z", "rx", "ry", "rz", "gripper_left", "gripper_right"]}, (0, 1, 2, 6, 7)),
        ({"gripper": 3, "z": 2, "x": 0, "y": 1}, (0, 1, 2, 3)),
        (
            ["eef_pos_x", "eef_pos_y", "eef_pos_z", "eef_quat_x", "eef_quat_y", "eef_quat_z", "gripper_pos"],
            (0, 1, 2, 6),
        ),
        ({"motors": ["tcp.x", "tcp.y", "tcp.z", "gripper.pos", "gripper.vel"]}, (0, 1, 2, 3)),
        (["left_x", "left_y", "left_z", "right_x", "right_y", "right_z", "gripper"], None),  # which arm?
        (["x", "y", "z"], None),
        ([f"joint_{i}" for i in range(7)] + ["gripper"], None),
        (["state"], None),
        (None, None),
    ],
)
def test_columns_by_name(names, columns):
    assert named_columns(flat_names(names)) == columns


def test_a_gripper_in_another_unit_is_told():
    state = np.column_stack([np.zeros((4, 3)), [0.0, 200.0, 400.0, 850.0]])
    with pytest.raises(ConfigError, match=r"here: the gripper reads 0 to 850, expected 0 \(closed\) to 1 \(open\)"):
        end_effector(state, (0, 1, 2, 3), None, where="here")
    opening = end_effector(state, (0, 1, 2, 3), (850.0, 0.0), where="here")[:, 3]  # 850 means closed
    np.testing.assert_allclose(opening, [1.0, 1 - 200 / 850, 1 - 400 / 850, 0.0], atol=1e-6)


def test_cameras_of_a_dataset_are_listed_and_depth_is_not_chosen(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 2, "image")
    with pytest.raises(
        ConfigError, match=r"no camera 'top'.*There are: observation.images.depth, observation.images.f"
    ):
        read_trajectories(written.root, camera="top")
    with pytest.raises(StorageError, match=r"no column 'observation.images.depth'"):
        next(read_trajectories(written.root, camera="observation.images.depth"))


def edit(path, change):
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("version", [2, 3])
def test_what_a_dataset_lacks_is_named(tmp_path, version):
    root = LeRobotFolder(tmp_path / "data", version, "video").root
    info = root / "meta/info.json"
    whole = info.read_text()

    def broken(change, error, match):
        edit(info, change)
        with pytest.raises(error, match=match):
            next(read_trajectories(root))
        info.write_text(whole)

    broken(lambda d: d.update(codebase_version="v1.6"), ConfigError, r"'v1.6', understood are v2.0, v2.1 and v3.0")
    broken(lambda d: d.pop("fps"), StorageError, "no `features` or no `fps`")
    broken(lambda d: d["features"].pop("action"), ConfigError, "no feature `action` or `actions`")
    broken(lambda d: d.update(data_path="data/{nothing}.parquet"), StorageError, "data_path = .* cannot be filled in")
    broken(lambda d: d.update(video_path="../{video_key}.mp4"), StorageError, "leads out of the dataset's folder")
    info.write_text("{")
    with pytest.raises(StorageError, match=r"info.json: unreadable"):
        read_trajectories(root)
    info.write_text(whole)
    video = next(root.rglob("*.mp4"))
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match=rf"{video.name}: "):
        list(read_trajectories(root))
    video.unlink()
    with pytest.raises(StorageError, match=rf"{video.name}: this video is missing"):
        list(read_trajectories(root))
    video.write_bytes(data)
    rows = next((root / "data").rglob("*.parquet"))
    data = rows.read_bytes()
    rows.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match=rf"{rows.name}: truncated or damaged"):
        list(read_trajectories(root))
    rows.unlink()
    with pytest.raises(StorageError, match=rf"{rows.name}: missing"):
        list(read_trajectories(root))


def test_an_episode_that_is_shorter_than_listed_or_absent_is_told(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 3, "image")
    path = written.root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 12), path)
    with pytest.raises(StorageError, match=r"file-000.parquet: 6 rows of episode 1, 9 expected"):
        list(read_trajectories(written.root))
    pq.write_table(table.slice(0, 6), path)
    with pytest.raises(StorageError, match=r"episode 1 is not in this file"):
        list(read_trajectories(written.root))
    (written.root / "meta/episodes/chunk-000/file-000.parquet").unlink()
    with pytest.raises(StorageError, match="meta/episodes: no Parquet files"):
        read_trajectories(written.root)


def test_damaged_pictures_are_told(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 2, "image")
    path = written.root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    cells = table[written.camera].to_pylist()
    place = table.schema.get_field_index(written.camera)
    for cell, match in (({"bytes": b"no picture", "path": None}, "damaged picture"), ({"bytes": None}, "no picture")):
        broken = pa.array([*cells[:3], cell, *cells[4:]], table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), broken), path)
        with pytest.raises(StorageError, match=rf"episode 0, frame 3: .*{match}"):
            next(read_trajectories(written.root))


def test_an_instruction_may_stand_in_for_a_lacking_one(tmp_path):
    written = LeRobotFolder(tmp_path / "data", 2, "image")
    (written.root / "meta/tasks.jsonl").unlink()
    assert next(read_trajectories(written.root)).instruction == "open the drawer"  # from episodes.jsonl
    (written.root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 6}\n')
    edit(written.root / "meta/info.json", lambda d: d.update(total_episodes=1))
    with pytest.raises(ConfigError, match="no sentence for task_index 0"):
        next(read_trajectories(written.root))
    assert next(read_trajectories(written.root, instruction="pull")).instruction == "pull"


def test_episodes_and_sentences_that_the_metadata_lost_are_told(tmp_path):
    """Without a word an episode would be left out, or bear its neighbour's sentence."""
    written = LeRobotFolder(tmp_path / "data", 3, "image")
    info = written.root / "meta/info.json"
    edit(info, lambda d: d.update(total_episodes=3))
    with pytest.raises(StorageError, match=r"states 3 episodes .*, 2 are listed"):
        read_trajectories(written.root)
    edit(info, lambda d: d.update(total_episodes=2))
    rows = written.root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(rows)
    numbers = pa.array([0] * 6 + [1] * 5 + [7] * 4)
    pq.write_table(table.set_column(table.schema.get_field_index("task_index"), "task_index", numbers), rows)
    with pytest.raises(StorageError, match=r"episode 1: its rows bear task_index 7, which meta/tasks does not list"):
        list(read_trajectories(written.root))
    assert len(list(read_trajectories(written.root, instruction="do it"))) == 2
