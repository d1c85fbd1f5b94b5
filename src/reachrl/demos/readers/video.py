"""Frames out of video files as a viewer shows them, all of them or those at given times."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, UInt8

from reachrl.demos.damage import unreadable
from reachrl.demos.readers.frames import check_size
from reachrl.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

TOLERANCE_S = 1e-4  # how far a frame may lie from the time asked for: `tolerance_s` of LeRobot
_COARSEST_CLOCK_S = 1e-3  # a container that counts milliseconds rounds its frames' times by as much
_SQUARE = 0.02  # pixels stretched by less differ by a pixel's rounding of the frame's size
_HDR = (16, 18)  # transfer curves PQ and HLG: shown without tone mapping such frames are grey


def video_frames(path: Path) -> UInt8[np.ndarray, "F H W 3"]:
    """Decode a whole video.

    Raises:
        StorageError: the file is missing or damaged.
        ConfigError: the frames are too many to hold, or shown otherwise than they are stored.
    """
    frames: list[np.ndarray] = []
    with _opened(path) as (container, stream):
        check_size(stream.frames, stream.height, stream.width, str(path))
        for frame in container.decode(stream):
            frames.append(_upright(frame, path))
            check_size(len(frames), frame.height, frame.width, str(path))
    if not frames:
        raise StorageError(f"{path}: 0 frames found, at least one expected; fetch or write this file again.")
    return np.stack(frames)


def frames_at(path: Path, times: Float64[np.ndarray, "F"], *, where: str) -> UInt8[np.ndarray, "F H W 3"]:
    """Decode the frames nearest to given times, measured by the video's own clock.

    Args:
        path: the video.
        times: seconds, increasing.
        where: how an error calls the episode they belong to.

    Raises:
        StorageError: the file is missing or damaged, no frame lies within `TOLERANCE_S` of a time (and one tick of
            the container's clock, where that is coarser), or two times fall on one frame.
        ConfigError: the frames are too many to hold, or shown otherwise than they are stored.
    """
    frames: list[np.ndarray] = []
    used = -np.inf
    with _opened(path) as (container, stream):
        check_size(len(times), stream.height, stream.width, where)
        tick = float(stream.time_base or 0)
        tolerance = TOLERANCE_S + (tick if tick <= _COARSEST_CLOCK_S else 0.0)
        between = _neighbours(container, stream, times, path)
        for number, (wanted, neighbours) in enumerate(zip(times.tolist(), between, strict=True)):
            nearest = min(neighbours, key=lambda frame: abs(_time(frame, path) - wanted), default=None)
            found = None if nearest is None else _time(nearest, path)
            if nearest is None or found is None or abs(found - wanted) > tolerance or found <= used:
                what = "has no frame" if found is None else f"the nearest frame lies at {found:.6f} s"
                what += ", which the row before has taken" if found == used else ""
                raise StorageError(
                    f"{where}, row {number}: its frame belongs at {wanted:.6f} s of {path}; {what}, at most "
                    f"{tolerance:.2g} s away was expected. The table and the video do not belong together: fetch both "
                    "again, or write them anew."
                )
            used = found
            frames.append(_upright(nearest, path))
    return np.stack(frames)


def _neighbours(
    container: "InputContainer", stream: "VideoStream", times: Float64[np.ndarray, "F"], path: Path
) -> Iterator[list["VideoFrame"]]:
    """For each time the last frame before it and the first one at or after it, whichever are there."""
    before: VideoFrame | None = None
    left = times.tolist()[::-1]
    for frame in _decoded_from(container, stream, left[-1], path):
        while left and left[-1] <= _time(frame, path):
            left.pop()
            yield [frame] if before is None else [before, frame]
        if not left:
            return
        before = frame
    for _ in left:
        yield [] if before is None else [before]


def _decoded_from(
    container: "InputContainer", stream: "VideoStream", start: float, path: Path
) -> Iterator["VideoFrame"]:
    """The frames from a key frame at or before `start` seconds on."""
    earlier = max(0.0, start - _COARSEST_CLOCK_S - TOLERANCE_S)
    if earlier > 0 and stream.time_base:
        container.seek(int(earlier / stream.time_base), stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and _time(first, path) <= start:
            yield first
            yield from frames
            return
        container.seek(0, stream=stream)  # the index of key frames led too far
    yield from container.decode(stream)


def _time(frame: "VideoFrame", path: Path) -> float:
    if frame.time is None:
        raise StorageError(f"{path}: its frames bear no times; write it as .mp4 with a constant frame rate.")
    return frame.time


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a video; FFmpeg's exceptions become errors that name the file."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path.absolute())) as container:  # FFmpeg takes a colon in a relative path for a protocol
            stream = container.streams.best("video")
            if stream is None:
                raise StorageError(f"{path}: this file has no pictures, only other streams; expected a video.")
            assert isinstance(stream, av.VideoStream)
            _check_shown_as_stored(stream, path)
            yield container, stream
    except (FFmpegError, OSError) as error:
        raise unreadable(
            path,
            error,
            remedy="Fetch or write this file again.",
            missing="this video is missing",
            damage="damaged or not a video",
        ) from error


def _check_shown_as_stored(stream: "VideoStream", path: Path) -> None:
    """Refuse what a player would stretch or map to other colours; ranges and matrices of colours are applied."""
    ratio = float(stream.sample_aspect_ratio or 1)
    if abs(ratio - 1) > _SQUARE:
        raise ConfigError(
            f"{path}: its pixels are not square ({stream.sample_aspect_ratio}), so players stretch it and policies "
            "would not. Write it with square ones:  ffmpeg -i IN.mp4 -vf scale=iw*sar:ih,setsar=1 OUT.mp4"
        )
    if stream.codec_context.color_trc in _HDR:
        raise ConfigError(
            f"{path}: high dynamic range (transfer curve {stream.codec_context.color_trc}), which 8 bits a channel "
            "would show too grey. Write it in BT.709, for example with ffmpeg's zscale and tonemap filters."
        )


def _upright(frame: "VideoFrame", path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A frame turned and mirrored as the video's display matrix says.

    Source: FFmpeg, `libavutil/display.h`: a pixel in column p and row q is shown in column a p + c q + x and row
    b p + d q + y, the numbers being 16.16 fixed point.
    """
    image = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = (np.frombuffer(matrix, np.int32)[:5] / 2**16).tolist()
    turn = [round(x) for x in (a, b, c, d)]
    exact = max(abs(x - y) for x, y in zip(turn, (a, b, c, d), strict=True)) < 1e-3
    if not exact or sorted(map(abs, turn)) != [0, 0, 1, 1] or turn[0] * turn[3] == turn[1] * turn[2]:
        raise ConfigError(
            f"{path}: shown turned by {frame.rotation} degrees or scaled (display matrix {a:g} {b:g} {c:g} {d:g}); "
            "quarter turns and mirrors are understood. Write it upright, for example with  ffmpeg -i IN.mp4 OUT.mp4"
        )
    columns, rows = turn[0] or turn[2], turn[3] or turn[1]
    if turn[0] == 0:
        image = image.transpose(1, 0, 2)
    return image[::rows, ::columns]
