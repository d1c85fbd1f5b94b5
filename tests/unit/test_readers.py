"""Reading stored trajectories: files are written here in each layout and compared with what is read."""

import fcntl
import json
import sys

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folder import SIZE, LeRobotFolder, fingers, pictures

from reachrl.demos.readers import frames as frames_module
from reachrl.demos.readers import read_trajectories
from reachrl.demos.readers.end_effector import finger_opening
from reachrl.demos.readers.frames import slug
from reachrl.demos.store import finish_store, write_shard
from reachrl.errors import ConfigError, MissingExtra, StorageError
from reachrl.report.video import write_video
from reachrl.types import Start, Trajectory

SENTENCE = "put the black bowl on the plate"
# --- LIBERO -----------------------------------------------------------------------------------------


def write_libero(path, lengths=(5, 7), *, own=True, leave_out=(), cameras=("agentview_rgb", "eye_in_hand_rgb")):
    """A file as LIBERO's script writes it (`own`), or as its replay without idle actions; returns what is in it."""
    rng, written = np.random.default_rng(0), {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if own:
            data.attrs["problem_info"] = json.dumps({"language_instruction": SENTENCE, "problem_name": "x"})
            data.attrs["env_args"] = "{}"
            data.attrs["macros_image_convention"] = "opengl"
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            demo.create_group("obs")
            ee_states = rng.normal(size=(length, 6))
            parts = {
                "obs/ee_states": ee_states,
                "obs/ee_pos": ee_states[:, :3],
                "obs/gripper_states": fingers(length),
                "obs/joint_states": rng.normal(size=(length, 7)),
                "actions": rng.normal(size=(length, 7)),
                "dones": np.eye(length, dtype=np.uint8)[-1],
                "rewards": np.eye(length, dtype=np.uint8)[-1],
            } | {f"obs/{camera}": rng.integers(0, 256, (length, 8, 8, 3), np.uint8) for camera in cameras}
            for name, value in parts.items():
                if name not in leave_out:
                    demo.create_dataset(name, data=value)
            written[number] = parts
    return written


def test_libero_files_hold_what_was_written(tmp_path):
    path = tmp_path / "put_the_black_bowl_on_the_plate_demo.hdf5"
    written = write_libero(path)
    read = list(read_trajectories(path))
    assert [t.start for t in read] == [Start("put-the-black-bowl-on-the-plate", "train", i) for i in (0, 1)]
    for trajectory, parts in zip(read, written.values(), strict=True):
        assert trajectory.instruction == SENTENCE
        assert (trajectory.source, trajectory.success) == ("libero", True)
        np.testing.assert_array_equal(trajectory.frames, np.rot90(parts["obs/agentview_rgb"], 2, axes=(1, 2)))
        np.testing.assert_allclose(trajectory.ee_state[:, :3], parts["obs/ee_pos"], rtol=1e-6)
        np.testing.assert_allclose(trajectory.ee_state[:, 3], np.linspace(1, 0, len(trajectory.frames)), atol=1e-6)
        assert len(trajectory.actions) == len(trajectory.frames) - 1
        # LIBERO stored the frame that each action led to: the first frame is the one that the second action saw.
        np.testing.assert_array_equal(trajectory.actions, parts["actions"][1:].astype(np.float32))
        assert [trajectory.frames.dtype, trajectory.actions.dtype, trajectory.ee_state.dtype] == [
            np.uint8,
            np.float32,
            np.float32,
        ]


def test_frames_are_turned_by_180_degrees(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    write_libero(path, lengths=(2,))
    frame = np.zeros((4, 6, 3), np.uint8)
    frame[0, 0], frame[3, 5] = [255, 0, 0], [0, 255, 0]
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = np.stack([frame, frame])
    image = next(read_trajectories(path)).frames[0]
    assert image[3, 5].tolist() == [255, 0, 0] and image[0, 0].tolist() == [0, 255, 0]
    with h5py.File(path, "a") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"  # rows already in order
    image = next(read_trajectories(path)).frames[0]
    assert image[0, 5].tolist() == [255, 0, 0] and image[3, 0].tolist() == [0, 255, 0]


def test_a_replayed_file_has_its_sentence_in_its_name_and_frames_before_actions(tmp_path):
    path = tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"
    written = write_libero(path, own=False)
    first, _ = read_trajectories(path)
    assert first.instruction == "turn on the stove" and first.start.task == "KITCHEN_SCENE3_turn_on_the_stove"
    np.testing.assert_array_equal(first.actions, written[0]["actions"][:-1].astype(np.float32))
    said = next(read_trajectories(path, instruction="light it"))
    assert (said.instruction, said.start.task) == ("light it", "light-it")
    other = path.rename(tmp_path / "stove.hdf5")
    with pytest.raises(ConfigError, match=r"no sentence found.*Give an instruction"):
        next(read_trajectories(other))


# Names and BDDL sentences of the released files; what an evaluation shows is the file's name in words.
@pytest.mark.parametrize(
    ("task", "stored", "shown"),
    [
        (
            "open_the_middle_drawer_of_the_cabinet",
            "Open the middle layer of the drawer",
            "open the middle drawer of the cabinet",
        ),
        ("put_the_cream_cheese_in_the_bowl", "Put the cream cheese on the bowl", "put the cream cheese in the bowl"),
        ("turn_on_the_stove", "Turn on the stove", "turn on the stove"),
        (
            "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate",
            "Pick the akita black bowl on the cookies box and place it on the plate",
            "pick up the black bowl on the cookie box and place it on the plate",
        ),
        (
            "KITCHEN_SCENE2_stack_the_middle_black_bowl_on_the_back_black_bowl",
            "stack the black bowl in the middle on the black bowl at the front",
            "stack the middle black bowl on the back black bowl",
        ),
    ],
)
def test_sentence_and_task_are_those_of_the_evaluation(tmp_path, task, stored, shown):
    def written(name, **attributes):
        write_libero(tmp_path / name, lengths=(2,))
        with h5py.File(tmp_path / name, "a") as file:
            file["data"].attrs.update({"problem_info": json.dumps({"language_instruction": stored}), **attributes})
        return next(read_trajectories(tmp_path / name))

    for trajectory in (written(f"{task}_demo.hdf5"), written("mine.h5", bddl_file_name=f"x/libero_goal/{task}.bddl")):
        assert (trajectory.start.task, trajectory.instruction) == (task, shown)


def test_a_file_with_another_tasks_name_is_refused(tmp_path):
    path = tmp_path / "turn_on_the_stove_demo.hdf5"
    write_libero(path, lengths=(2,))
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_name"] = "bddl/libero_goal/open_the_middle_drawer_of_the_cabinet.bddl"
    with pytest.raises(
        StorageError, match="named after the task turn_on_the_stove, but was recorded in open_the_middl"
    ):
        next(read_trajectories(path))


def test_a_file_that_is_named_after_no_task_says_so(tmp_path, caplog):
    write_libero(tmp_path / "mine_demo.hdf5", lengths=(2,))
    trajectory = next(read_trajectories(tmp_path / "mine_demo.hdf5"))
    assert (trajectory.instruction, trajectory.start.task) == (SENTENCE, "put-the-black-bowl-on-the-plate")
    assert f"mine_demo.hdf5: named after no task of LIBERO's, so its own sentence '{SENTENCE}'" in caplog.text


def test_how_frames_are_stored_has_no_default_in_liberos_own_files(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    write_libero(path, lengths=(2,))
    for value in ("opengl2", None):
        with h5py.File(path, "a") as file:
            if value is None:
                del file["data"].attrs["macros_image_convention"]
            else:
                file["data"].attrs["macros_image_convention"] = value
        with pytest.raises(StorageError, match=rf"demo_0: the attribute macros_image_convention .* is {value!r}; exp"):
            next(read_trajectories(path))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("key", "place", "message"),
    [
        ("actions", (2, 0), "step 2: action is nan in dimension 0"),
        ("obs/ee_pos", (3, 1), r"step 3: ee_state.* is nan in dimension 1"),
        ("obs/gripper_states", (1, 0), r"step 1: ee_state.* is nan in dimension 3"),
        ("rewards", (4,), "the last of rewards or dones is not finite"),
    ],
)
def test_what_is_not_finite_is_refused_with_demonstration_and_step(tmp_path, own, key, place, message):
    path = tmp_path / "turn_on_the_stove_demo.hdf5"
    written = write_libero(path, lengths=(5, 5), own=own)
    values = np.array(written[1][key], np.float64)
    values[place] = np.nan
    with h5py.File(path, "a") as file:
        del file[f"data/demo_1/{key}"]
        file[f"data/demo_1/{key}"] = values
    stream = read_trajectories(path)
    next(stream)
    with pytest.raises(StorageError, match=rf"stove_demo.hdf5, demo_1(, |: ){message}"):
        next(stream)


def test_a_locked_hdf5_file_is_not_called_damaged(tmp_path):
    path = tmp_path / "turn_on_the_stove_demo.hdf5"
    write_libero(path)
    with path.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as HDF5 does for a program that writes
        with pytest.raises(StorageError, match=r"stove_demo.hdf5: locked: a program has it open for writing") as error:
            next(read_trajectories(path))
    assert "damaged" not in str(error.value) and "Fetch" not in str(error.value)
    next(read_trajectories(path))


def test_demonstrations_come_in_numeric_order_and_files_in_that_of_their_names(tmp_path):
    write_libero(tmp_path / "b_demo.hdf5", lengths=(2,) * 11, own=False)
    write_libero(tmp_path / "a_demo.h5", lengths=(3, 3), own=False)
    (tmp_path / "notes.txt").write_text("not data")
    read = [(t.start.task, t.start.index) for t in read_trajectories(tmp_path)]
    assert read == [("a", 0), ("a", 1), *[("b", i) for i in range(11)]]


@pytest.mark.parametrize(
    ("outcomes", "success"),
    [
        ({}, True),
        ({"dones": [0, 1]}, True),
        ({"rewards": [0, 0]}, False),
        ({"rewards": [1, 0], "dones": [0, 0]}, False),
    ],
)
def test_success_of_a_demonstration(tmp_path, outcomes, success):
    path = tmp_path / "a_demo.hdf5"
    write_libero(path, lengths=(2,), leave_out=("dones", "rewards"))
    with h5py.File(path, "a") as file:
        for key, values in outcomes.items():
            file[f"data/demo_0/{key}"] = np.array(values, np.uint8)
    assert next(read_trajectories(path)).success is success


def test_positions_may_come_from_ee_states(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    written = write_libero(path, lengths=(3,), leave_out=("obs/ee_pos",))
    np.testing.assert_allclose(
        next(read_trajectories(path)).ee_state[:, :3], written[0]["obs/ee_states"][:, :3], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        (
            ("obs/ee_pos", "obs/ee_states"),
            r"demo_0: no positions \(ee_pos or ee_states\).*found agentview_rgb,.*joint_st",
        ),
        (("obs/gripper_states",), r"demo_0: no finger joints \(gripper_states\).*found agentview_rgb"),
        (("actions",), r"demo_0: found \['dones', 'obs', 'rewards'\]; expected `actions`"),
    ],
)
def test_what_a_demonstration_lacks_is_named(tmp_path, leave_out, message):
    path = tmp_path / "a_demo.hdf5"
    write_libero(path, leave_out=leave_out)
    with pytest.raises(StorageError, match=message) as error:
        next(read_trajectories(path))
    assert str(path) in str(error.value)


def test_cameras_are_listed(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    written = write_libero(path)
    wrist = next(read_trajectories(path, camera="eye_in_hand_rgb"))
    np.testing.assert_array_equal(wrist.frames, written[0]["obs/eye_in_hand_rgb"][:, ::-1, ::-1])
    with pytest.raises(ConfigError, match=r"no camera 'top'.*There are: agentview_rgb, eye_in_hand_rgb"):
        next(read_trajectories(path, camera="top"))


def test_unequal_lengths_are_refused(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    write_libero(path, lengths=(5,), leave_out=("actions",))
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"] = np.zeros((4, 7))
    with pytest.raises(StorageError, match=r"actions \(4, 7\), 5 frames and 5 poses"):
        next(read_trajectories(path))


def test_damaged_hdf5_files_are_told(tmp_path):
    whole = tmp_path / "a_demo.hdf5"
    write_libero(whole)
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(whole.read_bytes()[:2000])
    text = tmp_path / "text.hdf5"
    text.write_text("not data")
    for path in (cut, text):
        with pytest.raises(StorageError, match=rf"{path.name}: truncated or damaged"):
            next(read_trajectories(path))
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["steps"] = np.zeros(3)
    with pytest.raises(StorageError, match=r"no group /data, found \['steps'\]"):
        next(read_trajectories(tmp_path / "other.hdf5"))
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        file.create_group("data").attrs["problem_info"] = "{}"
    with pytest.raises(StorageError, match="no demo_0"):
        next(read_trajectories(tmp_path / "empty.hdf5"))
    with h5py.File(whole, "a") as file:
        file["data"].attrs["problem_info"] = "{}"
    with pytest.raises(StorageError, match="no language_instruction"):
        next(read_trajectories(whole))


def test_without_h5py_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    write_libero(tmp_path / "a_demo.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reachrl\[data\]'"):
        read_trajectories(tmp_path / "a_demo.hdf5")


def test_openings_of_fingers():
    readings = np.array([[0.04, -0.04], [0.0, 0.0], [0.02, -0.02], [0.05, -0.04], [-0.001, 0.0]])
    np.testing.assert_allclose(finger_opening(readings), [1.0, 0.0, 0.5, 1.0, 0.0], atol=1e-7)


# --- videos, stores and runs ------------------------------------------------------------------------


def test_a_video_is_a_trajectory_without_poses_and_actions(tmp_path):
    frames = pictures(12)
    write_video(tmp_path / "try.mp4", frames, fps=8, hold_last_s=0)
    with pytest.raises(ConfigError, match="give an instruction"):
        read_trajectories(tmp_path / "try.mp4")
    (trajectory,) = read_trajectories(tmp_path / "try.mp4", instruction=SENTENCE)
    assert trajectory.start == Start("put-the-black-bowl-on-the-plate", "train", 0)
    assert (trajectory.source, trajectory.success, trajectory.instruction) == ("video", False, SENTENCE)
    assert trajectory.frames.shape == (12, SIZE, SIZE, 3) and trajectory.actions.shape == (11, 0)
    assert trajectory.ee_state.shape == (12, 4) and np.isnan(trajectory.ee_state).all()
    assert np.abs(trajectory.frames.astype(int) - frames).max() <= 6


def test_damaged_and_endless_videos_are_told(tmp_path, monkeypatch):
    path = tmp_path / "try.mp4"
    write_video(path, pictures(12), fps=8, hold_last_s=0)
    monkeypatch.setattr(frames_module, "MAX_BYTES", 10 * SIZE * SIZE * 3)
    with pytest.raises(ConfigError, match=r"12 frames of 32 x 32 pixels.*ffmpeg"):
        next(read_trajectories(path, instruction="x"))
    monkeypatch.undo()
    data = path.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        with pytest.raises(StorageError, match=r"try.mp4: "):
            next(read_trajectories(path, instruction="x"))
    path.write_text("not a video")
    with pytest.raises(StorageError, match=r"damaged or not a video"):
        next(read_trajectories(path, instruction="x"))


def made_up(task="press-it", index=0, steps=4):
    rng = np.random.default_rng(index)
    return Trajectory(
        start=Start(task, "train", index),
        instruction="press it",
        actions=rng.normal(size=(steps, 4)).astype(np.float32),
        images={"camera": rng.integers(0, 256, (steps + 1, 8, 8, 3), np.uint8)},
        ee_state=rng.random((steps + 1, 4)).astype(np.float32),
        success=True,
        source="expert",
    )


@pytest.fixture
def run_folder(tmp_path):
    run = tmp_path / "run"
    write_shard(run / "demos" / "press-it.parquet", [made_up(index=i) for i in range(3)])
    finish_store(run / "demos", ["press-it.parquet"])
    write_shard(run / "reward_model" / "rollouts" / "policy.parquet", [made_up(index=7)])
    (run / "config.json").write_text("{}")
    return run


def test_stores_shards_and_runs_are_recognised(run_folder):
    def read(path, **options):
        return [(t.start.index, t.instruction) for t in read_trajectories(path, **options)]

    assert read(run_folder / "demos") == [(i, "press it") for i in range(3)]
    assert read(str(run_folder / "demos" / "press-it.parquet"), instruction="push") == [(i, "push") for i in range(3)]
    assert read(run_folder) == [(i, "press it") for i in (0, 1, 2, 7)]
    (run_folder / "demos" / "meta.json").unlink()
    assert read(run_folder) == [(7, "press it")]
    (run_folder / "reward_model" / "rollouts" / "policy.parquet").unlink()
    with pytest.raises(ConfigError, match="run its demos stage first"):
        read(run_folder)
    with pytest.raises(ConfigError, match=r"holds .parquet files but no meta.json"):
        read(run_folder / "demos")


@pytest.mark.parametrize("name", ["nothing-here", "file.csv", "folder", "other", "listed"])
def test_what_is_not_understood_is_answered_with_what_is(tmp_path, name):
    (tmp_path / "file.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text('{"made": "by another program"}')
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "meta.json").write_text("3")
    with pytest.raises(ConfigError, match=r"trajectory store .*\.hdf5.*LeRobot.*\.mp4") as error:
        read_trajectories(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_parquet_file_of_other_origin_is_told_at_once(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(StorageError, match="not a shard of trajectories"):
        read_trajectories(tmp_path / "a.parquet")


def test_imported_trajectories_can_be_stored(tmp_path):
    LeRobotFolder(tmp_path / "data", 3, "image")
    write_shard(tmp_path / "store" / "all.parquet", read_trajectories(tmp_path / "data"))
    store = finish_store(tmp_path / "store", ["all.parquet"])
    assert store.tasks == ("open-the-drawer", "close-the-drawer") and len(store) == 2


@pytest.mark.parametrize(
    ("text", "name"), [("Put the Bowl, please!", "put-the-bowl-please"), ("a_b.c", "a-b-c"), ("  ?", "task")]
)
def test_names_of_tasks(text, name):
    assert slug(text) == name and len(slug(text * 90)) <= 100


def test_long_sentences_that_begin_alike_are_two_tasks():
    first, second = (slug(f"{'put the black bowl on the plate ' * 4}{side}") for side in ("left", "right"))
    assert first != second and len(first) == len(second) == 100


def test_what_tells_sentences_apart_tells_their_tasks_apart():
    sentences = ("turn it by 90", "turn it by -90", "turn it by +90", "move 1.5 cm", "move 1 5 cm", "open/close it")
    sentences += (
        "open close it",
        "\u0915\u0940",
        "\u0915\u093e",
        "\U0001f6aa",
        "\U0001f511",
        "!",
    )  # Hindi vowel signs, a door, a key
    names = [slug(sentence) for sentence in sentences]
    assert len(set(names)) == len(sentences)
    assert names[0] == "turn-it-by-90" and slug("Turn it by -90!") == names[1]
    assert slug("e\u0301t\u00e9") == slug("\u00c9t\u00e9.") == "\u00e9t\u00e9"  # one text, written in two ways
