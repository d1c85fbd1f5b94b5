"""Shared by the readers: names of tasks, limits on the size of an episode, encoded pictures."""

import hashlib
import io
import re
import unicodedata

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from reachrl.errors import ConfigError

_LONGEST_NAME = 100  # characters
MAX_BYTES = 2 * 2**30  # decoded frames of one trajectory; more is a film, not an episode
# Neither punctuation between words nor part of one: signs, marks, and what changes the number behind it.
_SIGN = re.compile(r"""[^\w\s.,:;!?'"`\u2018\u2019\u201c\u201d()\[\]_-]|[-.,:](?=\d)""")
_TELLING = re.compile(rf"[^\W_]+|{_SIGN.pattern}")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


def slug(text: str) -> str:
    """A task's name from a sentence or a file's name: lower-case words joined by hyphens.

    Sentences that differ in case and punctuation alone name one task. What else tells them apart (a minus before a
    number, a decimal point, vowel signs of other scripts) is kept in a digest at the end. Of a name longer than 100
    characters the end gives way to a digest of the whole.

    Args:
        text: anything; what is neither letter nor digit parts words.
    """
    text = unicodedata.normalize("NFC", text.lower())
    name = "-".join(re.findall(r"[^\W_]+", text)) or "task"
    whole = " ".join(_TELLING.findall(text))
    if len(name) <= _LONGEST_NAME and not _SIGN.search(text):
        return name
    digest = hashlib.sha256((whole if _SIGN.search(text) else name).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name[: _LONGEST_NAME - len(digest) - 1].strip('-')}-{digest}"


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


def decode_picture(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """A stored picture as a viewer shows it: turned as its EXIF data say, grey and palettes as colours.

    Raises:
        OSError: it is damaged, or holds more than 8 bits a channel.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith(("I", "F")):
            raise OSError(f"mode {image.mode}: expected 8 bits a channel; depth maps are no pictures")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)
