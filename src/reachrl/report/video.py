"""Videos of episodes: written as mp4 that browsers play, and read back."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from reachrl.report.overlay import draw_overlay
from reachrl.run.atomic import replacing


def write_film(
    path: Path,
    frames: UInt8[np.ndarray, "F H W 3"],
    *,
    instruction: str,
    success: bool,
    values: Sequence[float] | None = None,
    process: Sequence[float] | None = None,
    fps: int = 5,
) -> Path:
    """Write an episode as a video with the instruction, the numbers and the outcome drawn on; see `draw_overlay`.

    Raises:
        StorageError: The disk refused the write.
    """
    drawn = draw_overlay(frames, instruction=instruction, values=values, process=process, success=success)
    return write_video(path, drawn, fps=fps)


def media_url(path: Path) -> str:
    """The name of a local file for FFmpeg, which takes what stands before a colon for a protocol."""
    return f"file:{path}"


def write_video(path: Path, frames: UInt8[np.ndarray, "F H W 3"], *, fps: int = 8, hold_last_s: float = 1.0) -> Path:
    """Write frames as an H.264 mp4 that browsers play, in one piece.

    Args:
        path: The mp4; its folder is created.
        frames: Frames of even height and width.
        fps: Frames a second.
        hold_last_s: Seconds the last frame stays.

    Returns:
        `path`.

    Raises:
        StorageError: The disk refused the write; a video that was there before is still there.
    """
    import av

    path = Path(path)
    num_frames, height, width, _ = frames.shape
    if num_frames == 0 or height % 2 or width % 2:
        raise ValueError(f"a video needs frames of even height and width, got shape {frames.shape}")
    with (
        replacing(path) as copy,
        av.open(media_url(copy), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        order = [*range(num_frames), *[num_frames - 1] * round(hold_last_s * fps)]
        for index in order:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[index], format="rgb24")))
        container.mux(stream.encode())
    return path


def read_video(path: Path) -> UInt8[np.ndarray, "F H W 3"]:
    """Decode every frame of a video.

    Args:
        path: A video file.

    Returns:
        Its frames.
    """
    import av

    with av.open(media_url(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
