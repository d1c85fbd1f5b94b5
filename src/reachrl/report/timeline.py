"""The timeline of one iteration (`timeline.json`): spans of every process, and the load of the actors."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reachrl.errors import StorageError
from reachrl.report.formats import percent, plain, task_labels
from reachrl.report.pages import drawn
from reachrl.report.svg import Chart, ticks

LOOP = "loop"  # the lane whose last span ends the iteration
COLOURS = ("c-train", "c-process", "c-after", "c-sampled", "c-heat", "c-before")  # the last one also takes what is left
MAX_BOXES = 4000  # about half a megabyte of page
MAX_TRACKS = 3  # equal work at the same time is drawn side by side up to here, beyond as one
WIDTH, LEFT, RIGHT, TOP = 960, 158, 48, 22  # pixels: the picture and its margins
LANE, TRACK, GAP = 20, 9, 6  # pixels: a lane, one of several tracks of a lane, and between lanes
_MOST_MERGED = 8  # a merged box is at most so many times as long as what is too short to be drawn

Interval = tuple[float, float]


class Box(NamedTuple):
    """One rectangle of the picture: a span, or several that are too short to be told apart."""

    start: float
    end: float
    covered: float  # seconds of the spans inside, less than the box is long where it holds gaps
    count: int  # spans inside


def read_timeline(path: Path) -> dict[str, Any] | None:
    """Return the recorded timeline, or None where no iteration recorded one.

    Raises:
        StorageError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for span in record["spans"]:
            named = isinstance(span["who"], str) and isinstance(span["what"], str)
            if not (named and math.isfinite(span["end"] - span["start"])):
                raise ValueError(f"{span} is no span")
            span["end"] = max(span["start"], span["end"])  # a clock may be set back while the work goes on
        for entry in record.get("balance") or ():
            numbers = entry["rows"], entry["seconds_per_step"] or 0, entry.get("busy") or 0
            if "actor" not in entry or not all(map(math.isfinite, numbers)):
                raise ValueError(f"{entry} is no actor's balance")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is not a timeline ({error}); delete it and the report goes without") from error
    return record


def union(intervals: Iterable[Interval], window: Interval = (-math.inf, math.inf)) -> list[Interval]:
    """Join intervals that overlap or touch, in order, clipped to a window; empty ones are dropped."""
    joined: list[Interval] = []
    clipped = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    for start, end in sorted(interval for interval in clipped if interval[0] < interval[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Sequence[Interval]) -> float:
    """Return the seconds in intervals that do not overlap."""
    return math.fsum(end - start for start, end in intervals)


def iteration_window(spans: Sequence[dict[str, Any]]) -> Interval:
    """Return the iteration's extent: from 0 to the end of the loop's spans, or of all spans without a loop."""
    ends = [s["end"] for s in spans if s["who"] == LOOP] or [s["end"] for s in spans]
    return 0.0, max([0.0, *ends])


def seconds_by_what(spans: Sequence[dict[str, Any]], window: Interval) -> dict[str, float]:
    """Return the seconds of a window that each kind of work of one lane filled; kinds may overlap one another."""
    kinds: dict[str, list[Interval]] = {}
    for span in spans:
        kinds.setdefault(span["what"], []).append((span["start"], span["end"]))
    return {kind: length(union(intervals, window)) for kind, intervals in kinds.items()}


def busy_shares(spans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a lane per `who`, in order of appearance: how long it was busy, how long it waited, who was busy then.

    `busy`, `waiting` and `parts` (by kind of work) are seconds, `share` is of the iteration. `meanwhile` are the two
    lanes most often busy while this one waits, with the share of that waiting; not the loop, it spans all others' work.
    """
    window = _, total = iteration_window(spans)
    own: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        own.setdefault(span["who"], []).append(span)
    busy = {who: union(((s["start"], s["end"]) for s in mine), window) for who, mine in own.items()}
    lanes = []
    for who, intervals in busy.items():
        seconds, gaps = length(intervals), _gaps(intervals, window)
        waiting = length(gaps)
        others = [(other, _within(busy[other], gaps)) for other in busy if other not in (who, LOOP)]
        others = sorted((o for o in others if o[1] > 0.01 * waiting), key=lambda o: -o[1])[:2]
        lanes.append({
            "who": who, "busy": seconds, "waiting": waiting, "share": seconds / total if total else 0.0,
            "parts": list(seconds_by_what(own[who], window).items()),
            "meanwhile": [(other, time / waiting) for other, time in others] if waiting > 0.005 * total else [],
        })  # fmt: skip
    return lanes


def _gaps(intervals: Sequence[Interval], window: Interval) -> list[Interval]:
    """Return what joined intervals leave free of a window."""
    edges = [window[0], *(edge for interval in intervals for edge in interval), window[1]]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _within(intervals: Sequence[Interval], gaps: Sequence[Interval]) -> float:
    """Return the seconds of joined intervals that lie in gaps."""
    if not intervals or not gaps:
        return 0.0
    knots = np.asarray(intervals, float)
    # Seconds busy until a time: grows inside an interval, stands still between two.
    grown = np.cumsum(np.stack([np.zeros(len(knots)), knots[:, 1] - knots[:, 0]], axis=1).ravel())
    until = np.interp(np.asarray(gaps, float), knots.ravel(), grown)
    return float((until[:, 1] - until[:, 0]).sum())


def colours(spans: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a colour class for each kind of work; where there are too many kinds the shortest share the last."""
    seconds: dict[str, float] = {}
    for span in spans:
        seconds[span["what"]] = seconds.get(span["what"], 0.0) + span["end"] - span["start"]
    if len(seconds) <= len(COLOURS):
        return dict(zip(seconds, COLOURS, strict=False))
    longest = sorted(seconds, key=lambda kind: -seconds[kind])[: len(COLOURS) - 1]
    own = iter(COLOURS)
    return {kind: next(own) if kind in longest else COLOURS[-1] for kind in seconds}


def merge_short(track: Sequence[Box], short: float) -> list[Box]:
    """Merge neighbours closer than `short` seconds of which one is shorter; any two that are left last it together."""
    merged: list[Box] = []
    for box in track:
        last = merged[-1] if merged else box
        near = box.start - last.end < short and box.end - last.start <= _MOST_MERGED * short
        if merged and near and min(box.end - box.start, last.end - last.start) < short:
            merged[-1] = Box(last.start, box.end, last.covered + box.covered, last.count + box.count)
        else:
            merged.append(box)
    return merged


def _tracks(intervals: Iterable[Interval]) -> list[list[Box]]:
    """Part intervals of one kind into few tracks without overlap; where that takes too many, join them into one."""
    ordered, tracks = sorted(intervals), list[list[Box]]()
    for start, end in ordered:
        track = next((t for t in tracks if t[-1].end <= start), None)
        if track is None and len(tracks) == MAX_TRACKS:
            return [[Box(a, b, b - a, 1) for a, b in union(ordered)]]
        if track is None:
            tracks.append(track := [])
        track.append(Box(start, end, end - start, 1))
    return tracks


def lanes_of(spans: Sequence[dict[str, Any]], short: float) -> dict[str, list[list[tuple[str, Box]]]]:
    """Lay the spans out: for each `who` in order of appearance its rows, in each row boxes that do not overlap.

    Boxes shorter than `short` seconds are merged; it grows until there are at most `MAX_BOXES`.
    """
    kinds: dict[tuple[str, str], list[Interval]] = {}
    for span in spans:
        kinds.setdefault((span["who"], span["what"]), []).append((span["start"], span["end"]))
    raw = [(who, kind, track) for (who, kind), intervals in kinds.items() for track in _tracks(intervals)]
    longest = max((track[-1].end - track[0].start for _, _, track in raw), default=0.0)
    merged = [merge_short(track, short) for _, _, track in raw]
    while sum(map(len, merged)) > MAX_BOXES and 0 < short <= longest:
        short *= 2
        merged = [merge_short(track, short) for _, _, track in raw]
    lanes: dict[str, list[list[tuple[str, Box]]]] = {span["who"]: [] for span in spans}
    tracks = Counter((who, kind) for who, kind, _ in raw)
    for (who, kind, _), boxes in zip(raw, merged, strict=True):
        track = [(kind, box) for box in boxes]
        for row in lanes[who]:
            both = sorted([*row, *track], key=lambda entry: entry[1])
            # Kinds that need several rows share none: a row that changes its meaning half way is hard to read.
            single = tracks[who, kind] == tracks[who, row[0][0]] == 1
            if single and all(a.end <= b.start for (_, a), (_, b) in pairwise(both)):
                row[:] = both
                break
        else:
            lanes[who].append(track)
    return lanes


def timeline_chart(spans: Sequence[dict[str, Any]], *, title: str = "Timeline of one iteration") -> str:
    """Draw a lane per `who` with a box per span; overlapping spans are in rows one below the other.

    Boxes that hold several short spans are as pale as they are empty.
    """
    start, end = min([0.0, *(s["start"] for s in spans)]), max([0.0, *(s["end"] for s in spans)])
    end = end if end > start else start + 1.0
    lanes = lanes_of(spans, (end - start) / (WIDTH - LEFT - RIGHT))
    heights = [LANE if len(rows) < 2 else max(LANE, TRACK * len(rows)) for rows in lanes.values()]
    chart = Chart(
        (start, end), (0, 1), width=WIDTH, height=TOP + sum(heights) + GAP * len(heights) + 42,
        margin=(TOP, RIGHT, 42, LEFT), x_label="seconds since the iteration began", y_ticks=False, title=title,
    )  # fmt: skip
    window = iteration_window(spans)
    for tick in (*ticks(start, end, about=9), *window):
        at, css = chart.x(tick), "axis" if tick in window else "grid"
        chart.add(f'<line class="{css}" x1="{at}" x2="{at}" y1="{TOP}" y2="{chart.bottom}"/>')
    chart.text(chart.right + 8, TOP - 6, "busy", css="label")
    names, hues = task_labels(list(lanes)), colours(spans)
    shares = {lane["who"]: lane["share"] for lane in busy_shares(spans)}
    y = TOP + GAP / 2
    for (who, rows), height in zip(lanes.items(), heights, strict=True):
        chart.text(chart.left - 10, y + height / 2 + 4, names[who], anchor="end", css="row")
        chart.text(chart.right + 8, y + height / 2 + 4, percent(shares[who]))
        for i, row in enumerate(rows):
            for kind, box in row:
                _draw(chart, box, f"{who}: {kind}", hues[kind], y + height / len(rows) * i, height / len(rows))
        y += height + GAP
    return chart.render()


def _draw(chart: Chart, box: Box, name: str, colour: str, top: float, height: float) -> None:
    """Draw one box and say what it holds."""
    note = f"{name}, {box.start:.3f} to {box.end:.3f} s"
    if box.count > 1:
        note += f", {box.count} spans of {box.covered:.3f} s in all"
    shade = box.covered / (box.end - box.start) if box.end > box.start else 1.0
    wide = max(0.6, chart.x(box.end) - chart.x(box.start))  # the shortest must still be seen
    chart.rect(chart.x(box.start), top, wide, height - 1, colour, note=note, opacity=max(0.12, shade))


def balance_of(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the rows of the balance table, their picture and how much longer the slowest actor takes than the mean.

    An actor's load is its environments times its seconds per step; None where there are no actors.
    """
    if not entries:
        return None
    rows = [{"host": None, "busy": None, "load": None, "name": f"actor {e['actor']}", **e} for e in entries]
    known = [row for row in rows if row["seconds_per_step"] is not None]
    for row in known:
        row["load"] = row["rows"] * row["seconds_per_step"]
    mean = sum(row["load"] for row in known) / len(known) if known else 0.0
    if mean <= 0:
        return {"rows": rows, "slowest": None}
    slowest, chart = max(known, key=lambda row: row["load"]), drawn(_balance_chart(known, mean))
    return {"rows": rows, "slowest": slowest, "ratio": slowest["load"] / mean, "chart": chart}


def _balance_chart(rows: Sequence[dict[str, Any]], mean: float) -> str:
    most, height = max(row["load"] for row in rows), 26 * len(rows) + 56
    chart = Chart(
        (0, most * 1.25), (0, 1), width=560, height=height, margin=(18, 12, 38, 120), y_ticks=False,
        x_label="environments × seconds per step", title="Load of each actor and the mean",
    )  # fmt: skip
    for i, row in enumerate(rows):
        y = chart.top + 26 * i
        chart.text(chart.left - 10, y + 16, row["name"], anchor="end", css="row")
        chart.rect(chart.left, y + 3, chart.x(row["load"]) - chart.left, 18, "c-train", opacity=0.75)
        chart.text(max(chart.x(row["load"]), chart.x(mean)) + 7, y + 16, f"{plain(row['load'])} s")
    at = chart.x(mean)
    chart.add(f'<path class="line thin dashed c-before" d="M{at} {chart.top - 2}V{chart.bottom}"/>')
    chart.text(at, chart.top - 6, "mean", anchor="middle")
    return chart.render()


def timeline_section(run_path: Path) -> dict[str, Any] | None:
    """Return what the report shows of a run's recorded iteration, or None without one; raises as `read_timeline`."""
    record = read_timeline(run_path / "timeline.json")
    if not record or not (record["spans"] or record.get("balance")):
        return None
    spans, lanes = record["spans"], busy_shares(record["spans"])
    key: dict[str, list[str]] = {}
    for kind, colour in colours(spans).items():
        key.setdefault(colour, []).append(kind)
    title = f"Timeline of iteration {record.get('iteration', '–')}: {', '.join(lane['who'] for lane in lanes)}"
    workers = sorted((lane for lane in lanes if lane["who"] != LOOP), key=lambda lane: lane["share"])
    return {
        "iteration": record.get("iteration"),
        "seconds": iteration_window(spans)[1],
        "chart": drawn(timeline_chart(spans, title=title)) if spans else None,
        "key": [(", ".join(kinds), colour) for colour, kinds in key.items()],
        "lanes": lanes,
        "extremes": (workers[-1], workers[0]) if len(workers) > 1 else None,
        "balance": balance_of(record.get("balance") or ()),
    }
