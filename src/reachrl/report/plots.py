"""The report's charts, each drawn from records on disk."""

import math
from collections.abc import Sequence
from typing import Any

from reachrl.functional.stats import wilson
from reachrl.report.formats import percent, plain, task_labels
from reachrl.report.series import (
    TimeAxis,
    blocks,
    mean_row,
    moving_success,
    moving_uniform_success,
    rate_of,
    time_axes,
)
from reachrl.report.svg import Chart, span

NARROW = 316  # pixels of a picture that a telephone shows whole, with words of at least 11 pixels
MOST_COLUMNS = 120  # of a heat map


def success_interval_chart(
    rows: Sequence[tuple[str, dict[str, Any], str]], *, label_width: int = 128, narrow: bool = False
) -> str:
    """Draw one horizontal interval per (label, success record, colour), labels `label_width` wide at most."""
    height = 30 + 30 * len(rows)
    chart = Chart(
        (0, 1), (0, 1), width=NARROW if narrow else 560, height=height, margin=(6, 16, 24, label_width),
        x_format=percent, y_ticks=False, title="Success rates with 95 % intervals",
    )  # fmt: skip
    for i, (label, record, colour) in enumerate(rows):
        y = 6 + 30 * i + 13
        rate, (low, high) = rate_of(record)
        chart.text(chart.left - 10, y + 4, label, anchor="end", css="row")
        chart.add(f'<line class="grid" x1="{chart.left}" x2="{chart.right}" y1="{y}" y2="{y}"/>')
        chart.row_whisker(y, low, high, colour)
        chart.add(
            f'<circle class="dot {colour}" cx="{chart.x(rate)}" cy="{y}" r="6">'
            f"<title>{record['k']} of {record['n']}</title></circle>"
        )
    return chart.render()


def learning_curve(
    train: Sequence[dict[str, Any]],
    evals: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]] = (),
    *,
    axis: TimeAxis | None = None,
    narrow: bool = False,
) -> tuple[str, int]:
    """Draw training success (pooled over a window, with a band), evaluations and validations (with whiskers).

    The window is a tenth of the run, at most 10 iterations.

    Training success is drawn twice where the chances of the episodes are known: as the curriculum drew them, and
    weighed to a uniform draw.

    Args:
        train: Training records.
        evals: Evaluation records with `iteration`, `mode`, `k`, `n`.
        validation: Those of evaluations on validation starts.
        axis: What it is drawn against; by default the iteration.
        narrow: Draw it for a telephone.

    Returns:
        The SVG and the window.
    """
    window = max(1, min(10, round(len(train) / 10)))
    axis = axis or time_axes(())[0]
    last = max([axis.at(r["iteration"]) for r in [*train, *evals, *validation]], default=1) or 1
    chart = Chart(
        (-0.012 * last, last * 1.02), (0, 1), width=NARROW if narrow else 960, height=250 if narrow else 360,
        margin=(22, 16, 42, 48), x_label=axis.label, y_label="success rate", y_format=percent, title="Learning curve",
    )  # fmt: skip
    pooled = [mean_row(block) for block in blocks(moving_success(train, window))]
    if pooled:
        xs, rates, lows, highs = (list(column) for column in zip(*pooled, strict=True))
        xs = [axis.at(x) for x in xs]
        chart.band(xs, lows, highs, "c-train")
        _draw_iterations(chart, train, axis)
        chart.line(list(zip(xs, rates, strict=True)), "c-train")
    weighed = [mean_row(block) for block in blocks(moving_uniform_success(train, window))]
    if weighed:
        xs = [axis.at(x) for x, *_ in weighed]
        chart.band(xs, [low for *_, low, _ in weighed], [high for *_, high in weighed], "c-uniform")
        chart.line([(x, rate) for x, (_, rate, *_) in zip(xs, weighed, strict=True)], "c-uniform")
    drawn = [(evals, "held out"), (validation, "validation starts")]
    colours = dict(curve_colours(evals, validation))
    for records, prefix in drawn:
        for mode in _modes(records):
            name = f"{prefix}, {mode}"
            points = sorted((r for r in records if r.get("mode", "greedy") == mode), key=lambda r: r["iteration"])
            places = [axis.at(r["iteration"]) + _SHIFTS.get(name, 0.0) * last for r in points]
            _draw_evaluations(chart, points, name, colours[name], places)
    return chart.render(), window


# Held-out points of the two usual temperatures stand side by side.
_COLOURS = {
    "held out, greedy": "c-after",
    "held out, sampled": "c-sampled",
    "validation starts, greedy": "c-value",
    "validation starts, sampled": "c-process",
}
_SHIFTS = {"held out, greedy": -0.004, "held out, sampled": 0.004}


def curve_colours(evals: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The evaluated curves of `learning_curve`, each with its colour; further temperatures share one."""
    names = [
        f"{prefix}, {mode}"
        for records, prefix in ((evals, "held out"), (validation, "validation starts"))
        for mode in _modes(records)
    ]
    return [(name, _COLOURS.get(name, "c-before" if name.startswith("held out") else "c-process")) for name in names]


def _modes(records: Sequence[dict[str, Any]]) -> list[str]:
    """The temperatures of evaluation records by name; `greedy` first, as ever."""
    return sorted(dict.fromkeys(r.get("mode", "greedy") for r in records))


def _draw_iterations(chart: Chart, train: Sequence[dict[str, Any]], axis: TimeAxis) -> None:
    """A faint dot for the episodes of each iteration, in a long run of some neighbours."""
    for block in blocks([record for record in train if record.get("success_n")]):
        k, n = (sum(record[key] for record in block) for key in ("success_k", "success_n"))
        first, last = block[0]["iteration"], block[-1]["iteration"]
        when = f"iteration {first}" if len(block) == 1 else f"iterations {first} to {last}"
        note = f"{when}: {k} of {n} training episodes"
        chart.dot(axis.at(last), k / n, "c-train", radius=1.8, note=note, css="dot faint")


def _draw_evaluations(
    chart: Chart, points: Sequence[dict[str, Any]], name: str, colour: str, places: Sequence[float]
) -> None:
    chart.line([(x, rate_of(r)[0]) for r, x in zip(points, places, strict=True)], colour, css="line thin dashed")
    for record, x in zip(points, places, strict=True):
        rate, (low, high) = rate_of(record)
        chart.whisker(x, low, high, colour)
        counts = f"{record['k']} of {record['n']} = {percent(rate)}"
        note = f"iteration {record['iteration']}, {name.removeprefix('held out, ')}: {counts}"
        chart.dot(x, rate, colour, radius=4.5, note=note)


def task_chart(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], *, narrow: bool = False) -> str:
    """Draw each task's success before and after as bars with 95 % whiskers and k/n beside them."""
    tasks = list(dict.fromkeys([*before, *after]))
    labels = task_labels(tasks)
    row = 40
    chart = Chart(
        (0, 1), (0, 1), width=NARROW if narrow else 470, height=row * len(tasks) + 34,
        margin=(6, 56 if narrow else 62, 26, 158), x_format=percent,
        y_ticks=False, title="Success per task before and after",
    )  # fmt: skip
    for i, task in enumerate(tasks):
        top = 6 + row * i + 6
        chart.text(chart.left - 10, top + 17, labels[task], anchor="end", css="row")
        for j, (results, colour) in enumerate(((before, "c-before"), (after, "c-after"))):
            record, y = results.get(task), top + 14 * j
            if record is None:
                chart.text(chart.left + 4, y + 10, "not run", css="tick")
                continue
            rate, (low, high) = rate_of(record)
            note = f"{task}: {record['k']} of {record['n']}, 95 % interval {percent(low)} to {percent(high)}"
            chart.rect(chart.left, y, chart.x(rate) - chart.left, 12, colour, note=note, opacity=0.55)
            chart.row_whisker(y + 6, low, high, colour)
            chart.text(chart.right + 8, y + 10, f"{record['k']}/{record['n']}")
    return chart.render()


def heat_map(
    rows: dict[str, Sequence[tuple[float, float | None]]],
    *,
    top: float,
    form: str,
    narrow: bool = False,
) -> str:
    """Draw numbers over (row, iteration) as shades; long runs are averaged into `MOST_COLUMNS` columns.

    Args:
        rows: For each task, (iteration, number or None).
        top: The number with the fullest shade.
        form: "share" writes per cent, anything else the plain number.
        narrow: Draw it for a telephone.
    """
    write = percent if form == "share" else plain
    iterations = sorted({x for points in rows.values() for x, _ in points})
    low, high = iterations[0], iterations[-1] + 1
    columns = min(MOST_COLUMNS, len(iterations))
    chart = Chart(
        (low, high), (0, 1), width=NARROW if narrow else 960, height=24 * len(rows) + 48,
        margin=(4, 44 if narrow else 60, 42, 158), x_label="training iteration",
        y_ticks=False, title="Heat map",
    )  # fmt: skip
    wide = (chart.right - chart.left) / columns
    labels = task_labels(list(rows))
    for i, (task, points) in enumerate(rows.items()):
        y = 4 + 24 * i
        chart.text(chart.left - 10, y + 15, labels[task], anchor="end", css="row")
        cells: dict[int, list[tuple[float, float]]] = {}
        for x, number in points:
            if number is not None:
                # multiplied before it is divided: 15 / 44 * 44 is less than 15
                cells.setdefault(int((x - low) * columns / (high - low)), []).append((x, number))
        for column, inside in cells.items():
            mean = sum(number for _, number in inside) / len(inside)
            note = f"{task}, iteration {plain(inside[0][0])}: {write(mean)}"
            shade = max(0.02, min(1.0, mean / top if top else 0))
            chart.rect(chart.left + wide * column, y, wide, 22, "c-heat", note=note, opacity=shade)
        last = next((number for _, number in reversed(points) if number is not None), None)
        if last is not None:
            chart.text(chart.right + 8, y + 15, write(last))
    return chart.render()


def calibration_chart(bins: Sequence[dict[str, Any]]) -> str:
    """Draw the observed share of positives against the predicted probability, dot area by count."""
    chart = Chart(
        (0, 1), (0, 1), width=380, height=340, margin=(22, 16, 42, 48), x_label="predicted P(progress)",
        y_label="observed share", x_format=percent, y_format=percent, title="Calibration of the reward model",
    )  # fmt: skip
    chart.line([(0, 0), (1, 1)], "c-before", css="line thin dashed")
    known = [b for b in bins if b.get("n") and b.get("p") is not None and b.get("observed") is not None]
    most = max([b["n"] for b in known], default=1)
    chart.line([(b["p"], b["observed"]) for b in known], "c-process", css="line thin")
    for b in known:
        chart.whisker(b["p"], *wilson(b["observed"] * b["n"], b["n"]), "c-process")
        note = f"predicted {percent(b['p'])}, observed {percent(b['observed'])} of {b['n']}"
        chart.dot(b["p"], b["observed"], "c-process", radius=3 + 6 * math.sqrt(b["n"] / most), note=note)
    return chart.render()


def panel(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float | None]]]],
    *,
    x_label: str,
    zero: bool = False,
    width: int = 310,
    height: int = 170,
) -> str:
    """Draw a small chart of one or a few (name, colour, points) series; `zero` keeps 0 in sight."""
    everything = [point for _, _, points in series for point in points]
    xs = [x for x, _ in everything]
    low, high = min(xs), max(xs)
    chart = Chart(
        (low, high if high > low else low + 1), span([y for _, y in everything], include=(0.0,) if zero else ()),
        width=width, height=height, margin=(8, 10, 34, 50), x_label=x_label,
        title=", ".join(name for name, _, _ in series),
    )  # fmt: skip
    for name, colour, points in series:
        chart.line(points, colour)
        if sum(y is not None for _, y in points) == 1:  # a line needs two
            x, y = next((x, y) for x, y in points if y is not None)
            chart.dot(x, y, colour, radius=3, note=f"{name} {plain(y)}")
    return chart.render()


def bar_rows(rows: Sequence[tuple[str, float, str]], colour: str = "c-after") -> str:
    """Draw horizontal bars for (label, size, words beside the bar)."""
    most = max([size for _, size, _ in rows], default=1) or 1
    chart = Chart(
        (0, most * 1.45), (0, 1), width=560, height=26 * len(rows) + 30, margin=(4, 12, 24, 120), y_ticks=False,
        title="Bars",
    )  # fmt: skip
    for i, (label, size, words) in enumerate(rows):
        y = 4 + 26 * i
        chart.text(chart.left - 10, y + 16, label, anchor="end", css="row")
        chart.rect(chart.left, y + 3, chart.x(size) - chart.left, 18, colour, note=words, opacity=0.75)
        chart.text(chart.x(size) + 7, y + 16, words)
    return chart.render()
