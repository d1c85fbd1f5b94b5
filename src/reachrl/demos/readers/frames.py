"""Frames out of video files and encoded pictures, with errors that name the file."""

import math
import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from reachrl.errors import ConfigError, StorageError

MAX_BYTES = 2 * 2**30  # decoded frames of one trajectory; more is a film, not an episode
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


def slug(text: str, *, longest: int = 100) -> str:
    """A task's name from a sentence or a file's name: lower-case words joined by hyphens.

    Args:
        text: anything; what is neither letter nor digit parts words.
        longest: characters kept, so that a file can bear the name.
    """
    return "-".join(re.findall(r"[^\W_]+", text.lower()))[:longest].strip("-") or "task"


def check_size(num_frames: int, height: int, width: int, where: str) -> None:
    """Refuse an episode whose decoded frames would not fit beside the rest of a program.

    Raises:
        ConfigError: the frames take more than `MAX_BYTES`.
    """
    size = num_frames * height * width * 3
    if size > MAX_BYTES:
        raise ConfigError(
            f"{where}: {num_frames} frames of {width} x {height} pixels are {size / 2**30:.1f} GiB decoded, at most "
            f"{MAX_BYTES / 2**30:.0f} GiB of one trajectory are read. Cut it into episodes or make it smaller, for "
            "example with ffmpeg -i IN.mp4 -vf scale=320:-2,fps=10 OUT.mp4"
        )


def video_frames(
    path: Path, *, start: float = 0.0, count: int | None = None, fps: float | None = None
) -> UInt8[np.ndarray, "F H W 3"]:
    """Decode a video, or one episode out of a video that holds several.

    Args:
        path: the video.
        start: seconds from the beginning of the video to the episode's first frame.
        count: frames of the episode; None: all of the video.
        fps: frames a second; needed with `count`.

    Raises:
        StorageError: the file is missing, damaged or shorter than `count` frames.
        ConfigError: the frames are too many to hold.
    """
    import av
    from av.error import FFmpegError

    assert count is None or fps, "an episode of known length needs its frame rate"
    half = 0.5 / fps if fps else 0.0  # a frame's time may be off by less than half a frame
    stop = start + count / fps - half if count is not None and fps else math.inf
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise StorageError(f"{path}: this file has no pictures, only other streams; expected a video.")
            stream = container.streams.video[0]
            check_size(count or stream.frames, stream.height, stream.width, str(path))
            if start > half and stream.time_base is not None:
                container.seek(int((start - half) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time < start - half:
                    continue  # a seek lands on the key frame before
                if len(frames) == count or (frame.time is not None and frame.time >= stop):
                    break
                frames.append(frame.to_ndarray(format="rgb24"))
                check_size(len(frames), frame.height, frame.width, str(path))
    except (FFmpegError, OSError) as error:
        raise _damaged(path, error) from error
    if not frames or (count is not None and len(frames) != count):
        expected = f"{count} from {start:.3f} s on" if count is not None else "at least one"
        raise StorageError(f"{path}: {len(frames)} frames found, {expected} expected; fetch or write this file again.")
    return np.stack(frames)


def _damaged(path: Path, error: Exception) -> StorageError:
    """The error to raise for a video that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{path}: this video is missing. Fetch the data again, videos included.")
    return StorageError(f"{path}: damaged or not a video ({error}). Fetch or write this file again.")
