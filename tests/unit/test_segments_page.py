"""`reachrl reward segments`: the page marks the right frames, shows the right pictures and needs no network."""

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from lerobot_folder import LeRobotFolder
from PIL import Image

from reachrl.demos.store import finish_store, write_shard
from reachrl.report.segments_page import SegmentedTrajectory, draw_row, page_facts, write_segments_page
from reachrl.report.video import write_video
from reachrl.types import Start, Trajectory

CUT, REST, LAST = 12, 9, 20
SIZE = 24


def grey(frame):
    """The level that tells a frame apart."""
    return 20 + 9 * frame


def trajectory(task="pick-up", index=0, *, moving=True, poses=True, success=True):
    """20 decisions: the arm rests at frame 9, the gripper closes at frame 12."""
    speed = np.full(LAST, 0.05)
    speed[REST - 2 : REST + 1] = [0.002, 0.001, 0.003]
    speed *= moving
    ee_state = np.zeros((LAST + 1, 4))
    ee_state[1:, 0] = np.cumsum(speed)
    ee_state[:, 3] = np.where(np.arange(LAST + 1) < CUT, 0.9, 0.3) if moving else 0.9
    if not poses:
        ee_state[:] = np.nan
    levels = np.array([grey(t) for t in range(LAST + 1)], np.uint8)
    return Trajectory(
        start=Start(task, "train", index),
        instruction="pick up the <red> cube",
        actions=np.zeros((LAST, 4), np.float32),
        images={"camera": np.broadcast_to(levels[:, None, None, None], (LAST + 1, SIZE, SIZE, 3)).copy()},
        ee_state=ee_state.astype(np.float32),
        success=success,
        source="expert",
    )


@pytest.fixture
def store(tmp_path):
    """A store of three trajectories, the last without a gripper change."""
    folder = tmp_path / "demos"
    write_shard(folder / "pick-up.parquet", [trajectory(index=0), trajectory(index=1)])
    write_shard(folder / "wave.parquet", [trajectory("wave", moving=False, success=False)])
    finish_store(folder, ["pick-up.parquet", "wave.parquet"])
    return folder


@pytest.fixture
def page(store, tmp_path, command_line):
    """The page of the store, as text."""
    code, out, err = command_line("reward", "segments", store, "--out", tmp_path / "page.html", columns=200)
    assert (code, err) == (0, "")
    return (tmp_path / "page.html").read_text(), out


def rows(html):
    """The part of each trajectory."""
    return html.split('<section class="card row-card"')[1:]


def test_the_summary_is_one_line_and_the_path(page, tmp_path):
    _, out = page
    line, path = out.splitlines()
    assert path == str(tmp_path / "page.html")
    assert re.fullmatch(
        r"3 trajectories: on average 1\.67 segments and 1\.33 keyframes, 1 without a gripper change; "
        r"labelled in [\d.e-]+ s",
        line,
    )


def test_marks_are_at_the_frames_known_by_construction(page):
    first, _, waving = rows(page[0])
    marks = re.findall(r'<figure class="mark[^"]*" data-frame="(\d+)" data-kinds="([^"]+)"', first)
    assert marks == [("0", "start"), ("9", "keyframe"), ("12", "cut"), ("20", "keyframe end")]
    assert re.findall(r'class="cut c-process" data-frame="(\d+)"', first) == ["12"] * 2  # in both charts
    assert re.findall(r'class="key-line c-sampled" data-frame="(\d+)"', first) == ["9", "20"] * 2
    assert "20 decisions, 2 segments, 2 keyframes" in first and ">success<" in first
    assert re.findall(r'data-frame="(\d+)" data-kinds="([^"]+)"', waving) == [("0", "start"), ("20", "end")]
    assert "1 segment, 0 keyframes, no gripper change" in waving and ">failure<" in waving


def test_lines_and_dots_stand_where_their_frames_are(page):
    first = rows(page[0])[0]
    speed, gripper = re.findall(r"<svg .*?</svg>", first, flags=re.DOTALL)
    left, right = 44, 640 - 14
    for chart in (speed, gripper):
        x = float(re.search(r'class="cut c-process" data-frame="12" x1="([\d.]+)"', chart)[1])
        assert x == pytest.approx(left + (right - left) * CUT / LAST, abs=0.02)
    dots = [float(x) for x in re.findall(r'class="dot keyframe c-sampled" cx="([\d.]+)"', speed)]
    assert dots == pytest.approx([left + (right - left) * frame / LAST for frame in (REST, LAST)], abs=0.02)
    labels = re.search(r'<path class="line label-line c-before" d="([^"]+)"', gripper)[1]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", labels)]
    assert len(heights) == LAST + 1 and (np.diff(heights) < 0).all()  # progress rises


def test_the_speed_is_drawn_as_keyframes_are_found_with_missed_poses_bridged(tmp_path, command_line):
    missed = trajectory(success=False)
    missed.ee_state[:, 0] = np.arange(LAST + 1) // 2 * 0.1  # a pose arrives at every second frame only
    write_shard(tmp_path / "missed.parquet", [missed])
    code, said, _ = command_line("reward", "segments", tmp_path / "missed.parquet", "--out", tmp_path / "page.html")
    assert code == 0 and "0.00 keyframes" in " ".join(said.split())
    speed = re.search(r"<svg .*?</svg>", rows((tmp_path / "page.html").read_text())[0], flags=re.DOTALL)[0]
    curve, rest = (
        [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(rf'class="{css}" d="([^"]+)"', speed)[1])]
        for css in ("line curve c-value", "line thin dashed c-before")
    )
    assert max(curve[1:]) < rest[0]  # heights count downwards: the arm never rests once it moves


def test_thumbnails_show_the_frames_they_name(page):
    html = page[0]
    found = re.findall(r'data-frame="(\d+)" data-kinds.*?src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(found) == 4 + 4 + 2
    for frame, data in found:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert image.shape == (SIZE, SIZE, 3)
        assert np.abs(image.astype(int) - grey(int(frame))).max() <= 2


def test_the_page_needs_no_network_and_escapes_words(page):
    html = page[0]
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses and all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|<script|<link", html)
    assert "pick up the &lt;red&gt; cube" in html and "<red>" not in html
    assert "prefers-color-scheme: dark" in html
    assert [re.search(r'<a href="#t(\d)">wave', html)[1]] == ["2"]


def test_large_frames_become_small_thumbnails(tmp_path):
    images = np.zeros((3, 300, 400, 3), np.uint8)
    row = draw_row(segmented(images=images))
    image = Image.open(io.BytesIO(base64.b64decode(row.marks[0].thumbnail.partition(",")[2])))
    assert image.size == (128, 96)


def segmented(**changes):
    facts = {
        "name": "a",
        "about": "",
        "instruction": "",
        "success": True,
        "images": np.zeros((3, 8, 8, 3), np.uint8),
        "opening": np.array([1.0, 1.0, 0.0]),
        "speed": np.array([0.1, 0.0]),
        "rest": 0.015,
        "labels": np.array([0.0, np.nan, 1.0]),
        "bounds": np.array([0, 2]),
        "keyframes": np.array([2]),
    }
    return SegmentedTrajectory(**facts | changes)


def test_frames_without_a_label_leave_gaps_and_lone_labels_are_dots():
    _, gripper = draw_row(segmented()).charts
    assert gripper.count("dot faint c-before") == 2
    assert re.search(r'label-line c-before" d="M[\d. ]+M[\d. ]+"', gripper)


def test_one_frame_is_drawn(tmp_path):
    one = segmented(
        images=np.zeros((1, 8, 8, 3), np.uint8),
        opening=np.ones(1),
        speed=np.zeros(0),
        rest=0.0,
        labels=np.ones(1),
        bounds=np.array([0, 0]),
        keyframes=np.array([0]),
    )
    row = draw_row(one)
    assert [(mark.frame, mark.kinds) for mark in row.marks] == [(0, ("start", "keyframe", "end"))]
    assert page_facts([row]) == {"trajectories": 1, "segments": 1.0, "keyframes": 1.0, "uncut": 1}
    path = write_segments_page(tmp_path / "new" / "page.html", [row], source="here", facts=[], options=[])
    assert path.is_file() and page_facts([])["segments"] == 0.0


# --- the command ------------------------------------------------------------------------------------


def test_thresholds_are_changed_by_set(store, tmp_path, command_line):
    out = tmp_path / "page.html"
    code, said, _ = command_line(
        "reward", "segments", store, "--out", out, "--set", "gripper_change=0.8", "--set", "reward_model.min_segment=2"
    )
    assert code == 0 and "1.00 segments" in said and "3 without a gripper change" in " ".join(said.split())
    assert "<span>gripper_change <b>0.8</b></span><span>min_segment <b>2</b></span>" in out.read_text()
    code, _, err = command_line("reward", "segments", store, "--out", out, "--set", "label=keyframe")
    assert (code, err) == (0, "")


def test_a_runs_own_thresholds_are_where_set_begins(store, tmp_path, command_line):
    out, file = tmp_path / "page.html", tmp_path / "config.json"  # the store is its demos/
    own = {"kind": "my_lab.absent:Model", "label": "keyframe", "keyframe_window": 2, "gripper_change": 0.8, "steps": 9}
    file.write_text(json.dumps({"reward_model": own}))
    code, said, _ = command_line("reward", "segments", tmp_path, "--out", out)
    assert code == 0 and "3 without a gripper change" in " ".join(said.split())
    shown = re.findall(r"<span>(\w+) <b>([^<]*)</b></span>", out.read_text())
    assert shown == [
        ("gripper_change", "0.8"),
        ("min_segment", "3"),
        ("keyframe_speed", "0.15"),
        ("label", "keyframe"),
        ("keyframe_window", "2"),
    ]
    code, said, _ = command_line("reward", "segments", tmp_path, "--set", "gripper_change=0.2", "--out", out)
    assert code == 0 and "1 without a gripper change" in " ".join(said.split())
    assert "<span>label <b>keyframe</b></span>" in out.read_text()
    file.write_text("{")
    code, _, err = command_line("reward", "segments", tmp_path, "--out", out, columns=400)
    assert code == 8 and "config.json: damaged" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("gripper_chang=0.2", "unknown key 'reward_model.gripper_chang' (did you mean 'gripper_change'?)"),
        ("gripper_change=wide", "reward_model.gripper_change = 'wide': Input should be a valid number"),
        ("gripper_change=2", "reward_model.gripper_change = '2': Input should be less than or equal to 1"),
        ("gripper_change", "--set 'gripper_change' is not of the form key=value"),
    ],
)
def test_a_wrong_threshold_is_named(store, tmp_path, command_line, change, told):
    code, out, err = command_line(
        "reward", "segments", store, "--out", tmp_path / "page.html", "--set", change, columns=400
    )
    assert (code, out) == (2, "") and told in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "page.html").exists()


def test_the_first_n_are_shown(store, tmp_path, command_line):
    out = tmp_path / "page.html"
    code, said, _ = command_line("reward", "segments", store, "--max", 2, "--out", out)
    assert code == 0 and said.startswith("2 trajectories")
    assert "Only the first 2 trajectories of those stored are shown" in out.read_text()
    command_line("reward", "segments", store, "--max", 3, "--instruction", "wave", "--out", out)
    assert "Only the first" not in out.read_text() and out.read_text().count("“wave”") == 3


def test_trajectories_without_poses_are_left_out_and_told(tmp_path, command_line):
    shard, out = tmp_path / "mixed.parquet", tmp_path / "page.html"
    write_shard(shard, [trajectory(), trajectory(index=5, poses=False)])
    code, said, err = command_line("reward", "segments", shard, "--out", out, columns=400)
    assert code == 0 and said.startswith("1 trajectory:")
    assert "1 trajectory left out: no finite end-effector poses" in err and "pick-up start 5 (expert)" in err
    write_video(tmp_path / "film.mp4", np.zeros((4, 16, 16, 3), np.uint8), hold_last_s=0)
    out.unlink()
    code, said, err = command_line(
        "reward", "segments", tmp_path / "film.mp4", "--instruction", "x", "--out", out, columns=400
    )
    assert (code, said) == (2, "") and "nothing to draw" in err and "Videos have none" in err and not out.exists()


def test_an_empty_store_and_an_unknown_path_are_told(tmp_path, command_line):
    write_shard(tmp_path / "empty.parquet", [])
    code, _, err = command_line("reward", "segments", tmp_path / "empty.parquet", "--out", tmp_path / "page.html")
    assert code == 2 and "it holds no trajectory" in " ".join(err.split())
    code, _, err = command_line("reward", "segments", tmp_path / "nowhere")
    assert code == 2 and "there is nothing here" in " ".join(err.split())
    code, _, err = command_line("reward", "segments", tmp_path, "--columns", "0,1,x")
    assert code == 2 and "expected whole numbers" in " ".join(err.split())


def test_a_lerobot_dataset_without_names_is_drawn_once_its_columns_are_said(tmp_path, command_line):
    written = LeRobotFolder(tmp_path / "data", 3, "image", names=None)
    out = tmp_path / "page.html"
    code, _, err = command_line("reward", "segments", written.root, "--out", out, columns=400)
    assert code == 2 and "--columns" in err
    code, said, _ = command_line(
        *("reward", "segments", written.root, "--out", out, "--state", written.state, "--columns", "0,1,2,6"),
        *("--gripper-range", "0,0.04", "--set", "keyframe_window=2"),
    )
    assert code == 0 and said.startswith("2 trajectories: on average 1.50 segments")
    assert "<span>keyframe_window <b>2</b></span>" in out.read_text()
    code, _, err = command_line("reward", "segments", written.root, "--gripper-range", "0", columns=400)
    assert code == 2 and "expected two numbers" in err


def test_the_command_starts_without_torch(store, tmp_path):
    script = (
        "import sys\n"
        f"sys.argv = ['reachrl', 'reward', 'segments', {str(store)!r}, '--out', {str(tmp_path / 'page.html')!r}]\n"
        "from reachrl.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('HEAVY', *sorted({'torch', 'transformers', 'av', 'h5py'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "HEAVY"
