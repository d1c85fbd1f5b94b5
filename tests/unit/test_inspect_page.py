"""The inspector: which episodes it shows, where the curve runs, what the page and the command say."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.demos.shard import write_shard
from reachrl.report.inspect_page import FRAME, FRAMES, InspectedEpisode, choose, draw_strip
from reachrl.report.video import write_video
from reachrl.rewards.process.base import load_reward_model
from reachrl.rewards.process.fit import fit_reward_model, split_starts
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.types import Start, Trajectory


def episode(scores, *, success=True, order=0.5, task="reach"):
    scores = np.array(scores, np.float32)
    grey = np.arange(len(scores), dtype=np.uint8)[:, None, None, None] * 10
    return InspectedEpisode(
        task=task,
        about="train start 0, policy",
        instruction="reach the <goal>",
        success=success,
        images=np.broadcast_to(grey, (len(scores), 16, 16, 3)),
        scores=scores,
        labels=np.linspace(0, 1, len(scores), dtype=np.float32),
        order=order,
    )


def test_mistakes_come_first_and_each_episode_once():
    liked, doubted = episode([0.1, 0.9], success=False), episode([0.1, 0.2], success=False)
    good, bad = episode([0, 1], order=1.0), episode([1, 0], order=-1.0)
    unknown = episode([0.5, 0.5], success=None, order=None)
    sections = choose([good, doubted, unknown, bad, liked], 1)
    assert [found for _, _, found in sections] == [[liked], [bad], [good]]
    everything = [each for _, _, found in choose([good, doubted, unknown, bad, liked], 9) for each in found]
    assert len(everything) == 5 and everything[0] is liked and everything[-1] is unknown


def points(curve, name):
    path = re.search(rf'<path class="{name}" d="M([^"]*)"', curve).group(1)
    return [tuple(float(number) for number in point.split()) for point in path.split("L")]


def test_the_curve_passes_over_the_frames_it_speaks_of():
    scores = np.linspace(0, 1, 21)
    strip = draw_strip(episode(scores))
    image = Image.open(io.BytesIO(base64.b64decode(strip.picture.partition(",")[2])))
    assert image.size == (FRAME * FRAMES, FRAME)
    curve = points(str(strip.curve), "score")
    assert len(curve) == 21
    for t, (x, y) in enumerate(curve):
        shown = np.asarray(image.convert("L"))[FRAME // 2, min(int(x), image.width - 1)]
        assert abs(shown - 10 * t) <= 12  # the frame under the curve is this one or a neighbour
        assert y == pytest.approx(FRAME - 2 - (FRAME - 4) * scores[t], abs=0.1)
    assert "last 1.00, highest 1.00" in strip.facts


def test_short_and_unlabelled_episodes_are_drawn_too():
    one = episode([0.3])
    assert len(points(str(draw_strip(one).curve), "score")) == 1
    blind = InspectedEpisode(**{name: getattr(one, name) for name in one.__slots__} | {"labels": np.full(1, np.nan)})
    assert '<path class="label-curve" d=""/>' in str(draw_strip(blind).curve)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    made = SmallRewardModel(image_size=32, channels=(8, 8, 8, 8), hidden=8, instructions=["reach the goal"])
    made.save_pretrained(tmp_path / "run" / "reward_model" / "model")
    return tmp_path / "run"


def store(path, *, frames=6):
    rng = np.random.default_rng(0)
    trajectories = [
        Trajectory(
            start=Start("reach", "train", i),
            instruction="reach the goal",
            images={"camera": rng.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)},
            actions=np.zeros((frames - 1, 4), np.float32),
            ee_state=rng.random((frames, 4)).astype(np.float32),
            success=i % 2 == 0,
            source="policy",
        )
        for i in range(4)
    ]
    write_shard(path, trajectories)
    return trajectories


def test_the_command_scores_the_held_out_set_of_a_run(model, tmp_path, command_line):
    trajectories = store(model / "reward_model" / "audit.parquet")
    page = tmp_path / "page.html"
    code, out, _ = command_line("reward", "inspect", model, "--out", page)
    assert code == 0 and str(page) in out
    scores = [
        load_reward_model(model / "reward_model" / "model").score(t.frames, [t.instruction] * 6) for t in trajectories
    ]
    wins = [a[-1] > b[-1] for a in scores[::2] for b in scores[1::2]]
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["all"])
    assert row[1:4] == ["2", "2", f"{np.mean(wins):.3f}"]
    html = page.read_text()
    assert html.count('<figure class="strip">') == 4 and not re.search(r'(src|href)="https?:', html)


def test_videos_are_scored_without_an_outcome_unless_it_is_told(model, tmp_path, command_line):
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    video = write_video(tmp_path / "clip.mp4", frames, hold_last_s=0)
    page = tmp_path / "page.html"
    asked = ["reward", "inspect", model, video, "--instruction", "reach the goal", "--out", page]
    code, out, _ = command_line(*asked)
    assert code == 0 and "outcome unknown" in page.read_text() and "1 videos is not known" in page.read_text()
    code, out, _ = command_line(*asked, "--outcome", "failure")
    assert code == 0 and next(line.split() for line in out.splitlines() if line.split()[:1] == ["all"])[1:3] == [
        "0",
        "1",
    ]


def calibration_error(page):
    return re.search(r"([\d.]+)</\w+>\s*<[^>]*>calibration error", page.read_text()).group(1)


def test_a_model_is_judged_by_the_labels_it_was_fitted_to(tmp_path, command_line):
    run, page = tmp_path / "run", tmp_path / "page.html"
    data = store(tmp_path / "all.parquet", frames=12)
    config = SmallRewardModelConfig(
        label="keyframe", keyframe_window=2, steps=3, image_size=32, channels=(8, 8, 8, 8), hidden=8
    )
    quality = fit_reward_model(data, config, seed=0, folder=run / "reward_model").quality["heldout"]
    heldout = split_starts(data, config.heldout_fraction, 0)
    write_shard(run / "reward_model" / "audit.parquet", [each for each in data if each.start in heldout])

    assert command_line("reward", "inspect", run, "--out", page)[0] == 0
    assert "labels: keyframe" in page.read_text() and "is not known" not in page.read_text()
    assert calibration_error(page) == f"{quality['calibration_error']:.3f}"
    assert command_line("reward", "inspect", run, "--set", "label=progress", "--out", page)[0] == 0
    assert "labels: progress" in page.read_text()
    assert calibration_error(page) != f"{quality['calibration_error']:.3f}"

    (run / "reward_model" / "quality.json").unlink()
    assert command_line("reward", "inspect", run, "--out", page)[0] == 0
    assert "labels: progress" in page.read_text() and "What the model was fitted to is not known" in page.read_text()
    (run / "reward_model" / "quality.json").write_text("{")
    code, _, err = command_line("reward", "inspect", run, "--out", page, columns=400)
    assert code == 8 and "quality.json: damaged" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no reward model lies here"),
        (["{run}"], "no held-out trajectories"),
        (["{run}", "nowhere.mp4"], "nowhere.mp4"),
        (["{run}", "{audit}", "--instruction", "stack cups"], "knows no word of the instruction"),
        (["{run}", "{audit}", "--set", "gripper_change=7"], "gripper_change"),
    ],
)
def test_mistakes_are_told_without_a_traceback(model, tmp_path, command_line, arguments, message):
    audit = tmp_path / "other.parquet"
    store(audit)
    filled = [str(argument).format(run=model, audit=audit) for argument in arguments]
    code, _, err = command_line("reward", "inspect", *filled, "--out", tmp_path / "page.html")
    assert code != 0 and message in err and "Traceback" not in err
    assert not (tmp_path / "page.html").exists()


def test_frames_of_another_size_are_scored_and_the_newest_version_is_used(model, tmp_path, command_line):
    torch.manual_seed(1)
    newer = SmallRewardModel(image_size=64, channels=(8, 8, 8, 8), hidden=8, instructions=["reach the goal"])
    newer.save_pretrained(model / "reward_model" / "version_0002" / "model")
    store(model / "reward_model" / "audit.parquet")
    page = tmp_path / "page.html"
    code, _, _ = command_line("reward", "inspect", model, "--out", page)
    assert code == 0 and "version_0002" in page.read_text()
