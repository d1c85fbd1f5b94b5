"""What a page embeds of pictures and videos, as data URIs, and which videos it has room for."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from reachrl.report.video import read_video
from reachrl.run.file_names import file_name

MAX_VIDEO_BYTES = 8_000_000  # base64 adds a third; the whole page stays under 15 MB
T = TypeVar("T")


def clip(path: Path) -> dict[str, str]:
    """What a page embeds of a video file: `video` and `poster`, data URIs."""
    return {"video": data_uri(path.read_bytes(), "video/mp4"), "poster": poster(path)}


def clips_that_fit(films: Mapping[str, Sequence[Path]], room: int) -> tuple[dict[str, list[dict[str, str]]], list[str]]:
    """What a page of limited size embeds of films, the first ones first.

    Args:
        films: Video files by a name; those of one name are shown together or not at all.
        room: Bytes of video files that the page may hold.

    Returns:
        The clips by name, and the names for which there was no room.
    """
    clips, left_out = {}, []
    for name, paths in films.items():
        size = sum(path.stat().st_size for path in paths)
        if size > room:
            left_out.append(name)
            continue
        room -= size
        clips[name] = [clip(path) for path in paths]
    return clips, left_out


def films_by_task(films: Mapping[str, T], tasks: Iterable[str]) -> dict[str, T]:
    """Films by the tasks their files are named after, in the order of the tasks; other films last, by their names.

    Args:
        films: by the part of the file's name that stands for the task.
        tasks: those that may have been filmed.
    """
    rest, found = dict(films), {}
    for task in dict.fromkeys(tasks):
        name = next((name for name in (file_name(task), task) if name in rest), None)  # earlier versions kept the name
        if name is not None:
            found[task] = rest.pop(name)
    return found | {name: rest[name] for name in sorted(rest)}


def poster(path: Path) -> str:
    """Return a video's last frame as a JPEG data URI, shown until the video plays."""
    return jpeg_uri(Image.fromarray(read_video(path)[-1]), quality=80)


def jpeg_uri(image: Image.Image, quality: int) -> str:
    """Return a picture as a JPEG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(data: bytes, mime: str) -> str:
    """Return bytes as a `data:` URI."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
