"""A page on which a person judges the cuts and keyframes of trajectories: curves, marks and the frames at the marks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image

from reachrl.report.embed import jpeg_uri
from reachrl.report.formats import plain
from reachrl.report.pages import write_page
from reachrl.report.svg import Chart, span

THUMBNAIL = 128  # pixels of a thumbnail's longer side, at most
WIDTH, LEFT, RIGHT = 640, 44, 14
_MILLIMETRES = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentedTrajectory:
    """One trajectory with its milestones, as plain arrays."""

    name: str  # of the task
    about: str  # which start, who acted
    instruction: str
    success: bool
    images: UInt8[np.ndarray, "T+1 H W 3"]
    opening: Float[np.ndarray, "T+1"]  # of the gripper, 0 closed to 1 open
    speed: Float[np.ndarray, "T"]  # metres of the motion that led to frame t + 1, missed poses bridged
    rest: float  # speed below which the arm is at rest
    labels: Float[np.ndarray, "T+1"]  # 0..1; NaN: the frame has none
    bounds: Int64[np.ndarray, "S+1"]  # first frame of each segment, then the last frame
    keyframes: Int64[np.ndarray, "K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One frame shown as a thumbnail, and what it is."""

    frame: int
    kinds: tuple[str, ...]  # "start", "cut", "keyframe", "end"
    thumbnail: str  # data URI of a JPEG


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trajectory as drawn; its frames are no longer needed."""

    name: str
    about: str
    instruction: str
    success: bool
    decisions: int
    num_segments: int
    num_keyframes: int
    charts: tuple[str, ...]  # SVG
    marks: tuple[Mark, ...]


def draw_row(trajectory: SegmentedTrajectory) -> Row:
    """Draw one trajectory: the speed of the arm, the gripper with the labels, and the frames at the marks."""
    return Row(
        name=trajectory.name,
        about=trajectory.about,
        instruction=trajectory.instruction,
        success=trajectory.success,
        decisions=len(trajectory.speed),
        num_segments=len(trajectory.bounds) - 1,
        num_keyframes=len(trajectory.keyframes),
        charts=(_speed_chart(trajectory), _gripper_chart(trajectory)),
        marks=tuple(_marks(trajectory)),
    )


def write_segments_page(
    path: Path,
    rows: Sequence[Row],
    *,
    source: str,
    facts: Sequence[tuple[str, str]],
    options: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> Path:
    """Write the page: one HTML file that needs no network, in one piece.

    Args:
        path: the file; its folder is created.
        rows: what `draw_row` returned, in the order to be shown.
        source: where the trajectories come from.
        facts: (number, what it counts) shown at the top.
        options: (name, value) of the thresholds that were used.
        notes: sentences about what is not shown.

    Returns:
        `path`.

    Raises:
        StorageError: the disk refused the write; a page that was there before is still there.
    """
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row.name, number)
    return write_page(
        path,
        "segments.html.j2",
        rows=rows,
        source=source,
        facts=facts,
        options=options,
        notes=notes,
        first=first,
    )


def _marks(trajectory: SegmentedTrajectory) -> list[Mark]:
    last = int(trajectory.bounds[-1])
    kinds: dict[int, list[str]] = {0: ["start"]}
    for frame in trajectory.bounds[1:-1].tolist():
        kinds.setdefault(frame, []).append("cut")
    for frame in trajectory.keyframes.tolist():
        kinds.setdefault(frame, []).append("keyframe")
    kinds.setdefault(last, []).append("end")
    return [
        Mark(frame=frame, kinds=tuple(kinds[frame]), thumbnail=thumbnail(trajectory.images[frame]))
        for frame in sorted(kinds)
    ]


def thumbnail(frame: UInt8[np.ndarray, "H W 3"]) -> str:
    """A frame as a small JPEG in a data URI; never enlarged."""
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return jpeg_uri(image, quality=85)


def _chart(trajectory: SegmentedTrajectory, y: tuple[float, float], *, first: bool, y_label: str, title: str) -> Chart:
    """A chart over the frames with the segments and cuts in it; the lower one bears the frame numbers."""
    last = max(1, int(trajectory.bounds[-1]))
    chart = Chart(
        (0, last), y, width=WIDTH, height=128 if first else 124, margin=(22, RIGHT, 20 if first else 36, LEFT),
        x_label="" if first else "frame", y_label=y_label, title=title,
    )  # fmt: skip
    for i, (a, b) in enumerate(zip(trajectory.bounds[:-1].tolist(), trajectory.bounds[1:].tolist(), strict=True)):
        if i % 2:
            left, right = chart.x(a), chart.x(b)
            chart.rect(left, chart.top, right - left, chart.bottom - chart.top, "c-process", opacity=0.08)
    for frame in trajectory.bounds[1:-1].tolist():
        _vertical(chart, frame, "cut c-process", f"cut at frame {frame}")
        if first:
            chart.text(chart.x(frame) + 4, chart.top + 10, str(frame), css="cut-number")
    return chart


def _vertical(chart: Chart, frame: int, css: str, note: str) -> None:
    x = chart.x(frame)
    chart.add(
        f'<line class="{css}" data-frame="{frame}" x1="{x}" x2="{x}" y1="{chart.top}" y2="{chart.bottom}">'
        f"<title>{note}</title></line>"
    )


def _speed_chart(trajectory: SegmentedTrajectory) -> str:
    speed = (trajectory.speed * _MILLIMETRES).tolist()
    rest = trajectory.rest * _MILLIMETRES
    high = span(speed, include=(0.0, rest))[1] if any(speed) else 1.0
    chart = _chart(trajectory, (0.0, high), first=True, y_label="speed, mm a decision", title="Speed of the arm")
    chart.line([(0, rest), (max(1, len(speed)), rest)], "c-before", css="line thin dashed")
    chart.line([(t + 1, number) for t, number in enumerate(speed)], "c-value", css="line curve")
    for frame in trajectory.keyframes.tolist():
        _vertical(chart, frame, "key-line c-sampled", f"keyframe {frame}")
        height = speed[frame - 1] if frame else 0.0
        note = f"keyframe {frame}: {plain(height)} mm a decision"
        chart.dot(frame, height, "c-sampled", radius=4.5, note=note, css="dot keyframe")
    return chart.render()


def _gripper_chart(trajectory: SegmentedTrajectory) -> str:
    opening, labels = trajectory.opening.tolist(), trajectory.labels.tolist()
    low, high = span([*opening, 0.0, 1.0])
    chart = _chart(trajectory, (low, high), first=False, y_label="gripper opening and label", title="Gripper and label")
    labelled = [(t, label if label == label else None) for t, label in enumerate(labels)]
    chart.line(labelled, "c-before", css="line label-line")
    if any(label is None for _, label in labelled):  # a lone label has no line
        for t, label in labelled:
            if label is not None:
                chart.dot(t, label, "c-before", radius=2, note=f"label {plain(label)} at frame {t}", css="dot faint")
    chart.line(list(enumerate(opening)), "c-after", css="line curve")
    for frame in trajectory.keyframes.tolist():
        _vertical(chart, frame, "key-line c-sampled", f"keyframe {frame}")
    return chart.render()


def page_facts(rows: Sequence[Row]) -> dict[str, float]:
    """What the rows amount to: `trajectories`, mean `segments` and `keyframes`, and how many are `uncut`."""
    count = len(rows)
    return {
        "trajectories": count,
        "segments": sum(row.num_segments for row in rows) / count if count else 0.0,
        "keyframes": sum(row.num_keyframes for row in rows) / count if count else 0.0,
        "uncut": sum(row.num_segments == 1 for row in rows),
    }
