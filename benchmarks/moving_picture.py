"""The README's moving picture: a finished run's films before and after RL, side by side.

    python benchmarks/moving_picture.py runs/quickstart --out docs/pictures/quickstart.webp

Each column is a task that the run filmed (`eval.num_videos`), on its first held-out start state with sampled actions;
nothing is chosen by its outcome.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reachrl.run.file_names import file_name
from reachrl.report.video import read_video

LABEL, TITLE = 56, 22
BACKGROUND, INK = (255, 255, 255), (51, 65, 85)
LIMIT = 3_000_000


def frames_of(film: Path, size: int) -> list[Image.Image]:
    """The square camera frames at the lower edge of a film, without its caption and curves."""
    video = read_video(film)
    side = video.shape[2]
    return [Image.fromarray(frame[-side:]).resize((size, size), Image.Resampling.LANCZOS) for frame in video]


def compose(rows: dict[str, list[list[Image.Image]]], tasks: list[str], size: int) -> list[Image.Image]:
    """One picture a moment: a row before and a row after RL, a column for each task; films that are over hold still."""
    font = ImageFont.load_default(12)
    length = max(len(film) for films in rows.values() for film in films)
    drawn = []
    for moment in range(length):
        canvas = Image.new("RGB", (LABEL + size * len(tasks), TITLE + size * len(rows)), BACKGROUND)
        draw = ImageDraw.Draw(canvas)
        for column, task in enumerate(tasks):
            left = LABEL + size * column + (size - font.getlength(task)) / 2
            draw.text((left, 4), task, fill=INK, font=font)
        for row, (name, films) in enumerate(rows.items()):
            top = TITLE + size * row
            draw.multiline_text((4, top + size // 2 - 14), name, fill=INK, font=font)
            for column, film in enumerate(films):
                canvas.paste(film[min(moment, len(film) - 1)], (LABEL + size * column, top))
        drawn.append(canvas)
    return drawn


def main() -> None:
    """Compose and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=200, help="pixels of a frame's side")
    parser.add_argument("--every", type=int, default=2, help="keep every so manyth frame")
    arguments = parser.parse_args()
    tasks = json.loads((arguments.run / "config.json").read_text(encoding="utf-8"))["env"]["tasks"]
    films = arguments.run / "videos"
    tasks = [task for task in tasks if (films / f"after_{file_name(task, '.mp4')}").exists()]
    rows = {}
    for name, when in {"before\nRL": "before", "after\nRL": "after"}.items():
        whole = [frames_of(films / f"{when}_{file_name(task, '.mp4')}", arguments.size) for task in tasks]
        rows[name] = [[*film[:: arguments.every], film[-1]] for film in whole]
    first, *others = compose(rows, tasks, arguments.size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    first.save(arguments.out, save_all=True, append_images=others, duration=110, loop=0, quality=60, method=4)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(others) + 1} frames, {first.width} x {first.height}, {size / 1e6:.2f} MB")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:.0f} MB: take a smaller --size or a larger --every")


if __name__ == "__main__":
    main()
