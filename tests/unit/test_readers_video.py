"""Videos are read as a player shows them: turned, mirrored, in their own colours, or refused."""

import errno
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from lerobot_folder import pictures

from reachrl.demos.readers import read_trajectories
from reachrl.demos.readers.video import frames_at
from reachrl.errors import ConfigError, StorageError
from reachrl.report.video import write_video

RED, GREEN, BLUE, WHITE = (230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 230)


def scene():
    """A picture of four coloured quarters, wider than high: u8[32 48 3]."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:], image[16:, :24], image[16:, 24:] = RED, GREEN, BLUE, WHITE
    return image


def film(path, *, prepare=lambda stream: None, image=None):
    """Write three frames of a picture, stored as they are, with what `prepare` says of how to show them."""
    image = scene() if image is None else image
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0", "threads": "1"})
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuv444p"
        prepare(stream)
        for packet in [p for _ in range(3) for p in stream.encode(av.VideoFrame.from_ndarray(image))]:
            container.mux(packet)
        container.mux(stream.encode())
    return path


def read(path):
    return next(read_trajectories(path, instruction="look")).frames


# What a player does: FFmpeg's rotation is counter-clockwise, the mirrors follow it (`av_display_matrix_flip`).
@pytest.mark.parametrize("mirror", ["", "h"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_and_mirrored_videos_are_read_upright(tmp_path, degrees, mirror):
    path = film(
        tmp_path / "a.mp4",
        prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirror == "h"),
    )
    shown = np.rot90(scene(), degrees // 90)
    shown = shown[:, ::-1] if mirror == "h" else shown
    for images in (read(path), frames_at(path, np.array([0.0, 0.1, 0.2]), where="here")):
        assert images.shape == (3, *shown.shape)
        assert np.abs(images.astype(int) - shown).max() <= 4  # rounding of the colours' conversion


def test_a_video_is_refused_where_a_player_would_turn_it_by_45_degrees(tmp_path):
    path = film(tmp_path / "a.mp4", prepare=lambda stream: stream.set_display_rotation(45))
    with pytest.raises(ConfigError, match=r"a.mp4: shown turned by 45 degrees.*ffmpeg -i IN.mp4 OUT.mp4"):
        read(path)


@pytest.mark.parametrize(("ratio", "refused"), [(2, True), (Fraction(12, 11), True), (Fraction(81, 80), False)])
def test_pixels_that_are_not_square_are_refused(tmp_path, ratio, refused):
    path = film(tmp_path / "a.mp4", prepare=lambda s: setattr(s.codec_context, "sample_aspect_ratio", Fraction(ratio)))
    if not refused:
        assert read(path).shape == (3, 32, 48, 3)
        return
    with pytest.raises(ConfigError, match=r"a.mp4: its pixels are not square.*setsar=1"):
        read(path)


@pytest.mark.parametrize("curve", [16, 18])
def test_high_dynamic_range_is_refused(tmp_path, curve):
    path = film(tmp_path / "a.mp4", prepare=lambda stream: setattr(stream.codec_context, "color_trc", curve))
    with pytest.raises(ConfigError, match=rf"high dynamic range \(transfer curve {curve}\)"):
        read(path)


# ITU-R BT.601 and BT.709 by hand: luma weights of red and blue.
@pytest.mark.parametrize(("code", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114)])
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_those_of_the_videos_own_matrix_and_range(tmp_path, code, red, blue, full):
    colour = np.array([200.0, 30.0, 60.0])
    luma = red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]
    chroma = [(colour[2] - luma) / (2 * (1 - blue)), (colour[0] - luma) / (2 * (1 - red))]
    scale = (0, 1, 1) if full else (16, 219 / 255, 224 / 255)
    levels = [scale[0] + luma * scale[1], *(128 + x * scale[2] for x in chroma)]
    kind = "yuvj444p" if full else "yuv444p"
    frame = av.VideoFrame.from_ndarray(np.stack([np.full((16, 16), round(x), np.uint8) for x in levels]), format=kind)
    frame.colorspace, frame.color_range = code, 2 if full else 1
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0", "threads": "1"})
        stream.width = stream.height = 16
        stream.pix_fmt = kind
        stream.codec_context.colorspace, stream.codec_context.color_range = code, 2 if full else 1
        container.mux([*stream.encode(frame), *stream.encode()])
    assert np.abs(read(tmp_path / "a.mp4")[0, 8, 8].astype(int) - colour).max() <= 2


def test_a_colon_in_a_relative_path_is_no_protocol(tmp_path, monkeypatch):
    (tmp_path / "2026-11-27T14:05").mkdir()
    write_video(tmp_path / "2026-11-27T14:05" / "try.mp4", pictures(3), fps=8, hold_last_s=0)
    monkeypatch.chdir(tmp_path)
    assert len(read("2026-11-27T14:05/try.mp4")) == 3


def test_a_video_that_may_not_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    write_video(tmp_path / "try.mp4", pictures(3), fps=8, hold_last_s=0)

    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(av, "open", forbidden)
    with pytest.raises(StorageError, match=r"try.mp4: cannot be opened \(Permission denied\)"):
        read(tmp_path / "try.mp4")
