"""One video file as a trajectory without poses and actions."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reachrl.demos.readers.frames import slug
from reachrl.demos.readers.video import video_frames
from reachrl.errors import ConfigError
from reachrl.types import Start, Trajectory


def read_video_file(path: Path, *, instruction: str | None) -> Iterator[Trajectory]:
    """Read a video as one trajectory of source "video".

    Nothing in a video says what was done: there are no action dimensions (`actions` is f32[T 0]), `ee_state` is NaN
    and `success` is False. Its frames can be scored by a reward model; they cannot be cut into segments.

    Args:
        path: a file that FFmpeg can read.
        instruction: what was to be done.

    Raises:
        ConfigError: no instruction was given, or the video is too long.
        StorageError: the file is damaged.
    """
    if not instruction:
        raise ConfigError(f"{path}: a video does not say what is to be done in it; give an instruction.")
    return _read(path, instruction)


def _read(path: Path, instruction: str) -> Iterator[Trajectory]:
    images = video_frames(path)
    yield Trajectory(
        start=Start(slug(instruction), "train", 0),
        instruction=instruction,
        actions=np.empty((len(images) - 1, 0), np.float32),
        images={"video": images},
        ee_state=np.full((len(images), 4), np.nan, np.float32),
        success=False,
        source="video",
    )
