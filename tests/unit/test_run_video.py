"""Videos decode to the frames that were drawn, and the drawing follows the numbers."""

import errno
import itertools
import os
from pathlib import Path

import av
import numpy as np
import pytest

from reachrl.errors import StorageError
from reachrl.report import overlay
from reachrl.report.embed import clip, clips_that_fit, poster
from reachrl.report.overlay import draw_overlay
from reachrl.report.video import read_video, write_video

CURVE_ROWS = slice(44, 94)  # of a drawn frame with a caption of one line


def close(frame: np.ndarray, colour: tuple[int, int, int], tolerance: int = 30) -> np.ndarray:
    return np.abs(frame.astype(int) - np.array(colour)).max(-1) <= tolerance


def test_round_trip_and_browser_format(tmp_path: Path) -> None:
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    for t in range(5):
        frames[t] = (40 * t, 90, 200 - 40 * t)
    path = write_video(tmp_path / "a" / "x.mp4", frames, fps=4, hold_last_s=0.5)
    decoded = read_video(path)
    assert decoded.shape == (7, 48, 64, 3)
    assert np.abs(decoded[:5].astype(int) - frames).mean() < 4
    assert np.abs(decoded[6].astype(int) - frames[4]).mean() < 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 4
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is wholly there
    assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]
    assert poster(path).startswith("data:image/jpeg;base64,/9j/")


def test_films_that_do_not_fit_are_named_and_smaller_ones_after_them_shown(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    small = [write_video(tmp_path / f"small{i}.mp4", np.zeros((1, 16, 16, 3), np.uint8)) for i in range(3)]
    large = write_video(tmp_path / "large.mp4", noise)
    size = small[0].stat().st_size
    assert large.stat().st_size > 3 * size
    films = {"first": small[:1], "pair": [small[1], large], "last": small[2:]}
    clips, left_out = clips_that_fit(films, 2 * size)
    assert left_out == ["pair"]  # both of it, though the one alone would have had room
    assert clips == {"first": [clip(small[0])], "last": [clip(small[2])]}
    assert clips_that_fit(films, 0) == ({}, ["first", "pair", "last"])


def test_odd_sizes_are_refused_and_a_full_disk_keeps_the_old_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="even"):
        write_video(tmp_path / "x.mp4", np.zeros((1, 3, 4, 3), np.uint8))
    path = write_video(tmp_path / "x.mp4", np.zeros((1, 16, 16, 3), np.uint8))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"x\.mp4"):
        write_video(path, np.ones((1, 16, 16, 3), np.uint8))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("success", [True, False])
def test_verdict_only_on_the_last_frame_and_the_picture_is_the_frame_enlarged(success: bool) -> None:
    frames = np.zeros((4, 96, 96, 3), np.uint8)
    frames[:, :, 48:] = 255
    drawn = draw_overlay(frames, instruction="open it", values=[0.0] * 4, process=None, success=success)
    _, height, width, _ = drawn.shape
    assert height % 2 == 0 and width % 2 == 0 and width >= 288
    right, wrong = overlay.SUCCESS_COLOUR, overlay.FAILURE_COLOUR
    if not success:
        right, wrong = wrong, right
    for t in range(4):
        assert close(drawn[t], right, 2).sum() > 1000 if t == 3 else close(drawn[t], right, 2).sum() == 0
        assert close(drawn[t], wrong, 2).sum() == 0
    assert drawn[0, 240, 80].max() < 5 and drawn[0, 240, 230].min() > 250


def curve_height(frame: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Return the row of the topmost pixel of a colour in the curve's part of a drawn frame."""
    rows = np.nonzero(close(frame[CURVE_ROWS], colour, 3).any(1))[0]
    return float(rows.min()) if len(rows) else float("nan")


def test_curves_rise_with_the_numbers_and_hide_the_future() -> None:
    frames = np.zeros((6, 96, 96, 3), np.uint8)
    values = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    drawn = draw_overlay(frames, instruction="x", values=values, process=[0.5] * 5, success=True)
    heights = [curve_height(frame, overlay.VALUE_COLOUR) for frame in drawn]
    assert all(b < a for a, b in itertools.pairwise(heights))
    columns = [np.nonzero(close(frame[CURVE_ROWS], overlay.VALUE_COLOUR, 3).any(0))[0].max() for frame in drawn]
    assert all(b > a for a, b in itertools.pairwise(columns))
    silent = draw_overlay(frames, instruction="x", values=None, process=[float("nan")] * 5, success=True)
    assert np.isnan(curve_height(silent[2], overlay.VALUE_COLOUR))
