"""Sections of the report that one part of the run folder decides: conversation, curriculum, losses, alarm, timing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reachrl.report import plots
from reachrl.report.embed import MAX_VIDEO_BYTES, clips_that_fit
from reachrl.report.formats import duration, gibibytes
from reachrl.report.pages import drawn, two_widths
from reachrl.report.series import block_means

MAX_TURNS = 60
ACTION_NAMES = {
    4: ("dx", "dy", "dz", "gripper"),
    7: ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
}


def conversation_section(record: dict | None) -> dict[str, Any] | None:
    """One episode as the conversation it is, with at most `MAX_TURNS` turns; None without one."""
    if not record or not record.get("turns"):
        return None
    turns = record["turns"]
    dimensions = len((turns[0].get("actions") or [()])[0])
    names = ACTION_NAMES.get(dimensions, tuple(f"action[{i}]" for i in range(dimensions)))
    lines = [
        ("value", "c-value", [(t["step"], t.get("value")) for t in turns]),
        ("process reward", "c-process", [(t["step"], (t.get("rewards") or {}).get("process")) for t in turns]),
    ]
    lines = [line for line in lines if any(y is not None for _, y in line[2])]
    return {
        **{key: record.get(key) for key in ("task", "instruction", "start", "success")},
        "turns": turns[:MAX_TURNS],
        "more": max(0, len(turns) - MAX_TURNS),
        "names": names,
        "chart": drawn(plots.panel(lines, x_label="step", zero=True, width=960, height=190)) if lines else None,
        "lines": [(name, colour) for name, colour, _ in lines],
    }


def curriculum_section(train: Sequence[dict]) -> list[dict[str, Any]] | None:
    """Heat maps of the tasks' sampling weights and estimated success; None without such figures."""
    maps = []
    for prefix, title in (
        ("curriculum/", "Sampling weight of each task"),
        ("curriculum_success/", "Estimated success of each task"),
    ):
        keys = list(dict.fromkeys(key for record in train for key in record if key.startswith(prefix)))
        rows: dict[str, Sequence[tuple[float, float | None]]] = {
            key.removeprefix(prefix): [(r["iteration"], r.get(key)) for r in train] for key in keys
        }
        numbers = [y for points in rows.values() for _, y in points if y is not None]
        if not numbers:
            continue
        share = prefix == "curriculum_success/" or max(numbers) <= 1
        top = 1.0 if prefix == "curriculum_success/" else max(numbers)
        form = "share" if share else "plain"
        maps.append({"title": title, "chart": two_widths(plots.heat_map, rows, top=top, form=form)})
    return maps or None


def loss_chart(records: Sequence[dict], width: int) -> Any | None:
    """Draw training and held-out loss from the records of the warm start or the reward model."""
    series = [
        (name, colour, block_means({r["step"]: r[key] for r in records if "step" in r and key in r}))
        for name, colour, key in (("training", "c-train", "train_loss"), ("held out", "c-after", "heldout_loss"))
    ]
    series = [entry for entry in series if entry[2]]
    return drawn(plots.panel(series, x_label="step", width=width, height=240)) if series else None


def reward_model_section(records: Sequence[dict], record: dict | None) -> dict[str, Any] | None:
    """Losses of the fit and held-out quality; None where no model was fitted."""
    losses = loss_chart(records, 520)
    if not record and losses is None:
        return None
    record = record or {}
    figures = [
        ("held-out AUC", record.get("auc"), "0.5 is chance, 1 is perfect"),
        ("rank correlation", record.get("rank_correlation"), "with progress through the episode"),
        ("accuracy", record.get("accuracy"), "at a threshold of 0.5"),
        ("calibration error", record.get("ece"), "expected, 0 is perfect"),
    ]
    calibration = record.get("calibration")
    return {
        "figures": [(name, f"{number:.3f}", hint) for name, number, hint in figures if number is not None],
        "calibration": drawn(plots.calibration_chart(calibration)) if calibration else None,
        "losses": losses,
    }


def alarm_section(run_path: Path, train: Sequence[dict]) -> dict[str, Any] | None:
    """The iterations in which the audit said that reward and success had parted, and the films it made."""
    iterations = [record["iteration"] for record in train if record.get("audit/alarm")]
    if not iterations:
        return None
    films = {path.name: [path] for path in sorted((run_path / "videos").glob("alarm_*.mp4"))}
    clips, left_out = clips_that_fit(films, MAX_VIDEO_BYTES // 4)
    return {
        "first": iterations[0],
        "count": len(iterations),
        "of": len(train),
        "clips": [{"name": name} | shown for name, (shown,) in clips.items()],
        "left_out": left_out,
    }


def timing_section(summary: dict, stages: dict, train: Sequence[dict]) -> dict[str, Any] | None:
    """Seconds of each stage and of each part of an iteration; None before a stage has ended."""
    wall = {name: seconds for name, seconds in (summary.get("wall_s") or {}).items() if name != "total"}
    wall = wall or {name: record["wall_s"] for name, record in stages.items()}
    if not wall:
        return None
    rows = []
    for name, seconds in wall.items():
        peak = (stages.get(name) or {}).get("peak_rss_bytes")
        rows.append((name, seconds, duration(seconds) + (f", {gibibytes(peak)}" if peak else "")))
    spans: dict[str, list[float]] = {}
    for record in train:
        for key, seconds in record.items():
            if key.startswith("seconds/") and seconds is not None:
                spans.setdefault(key.removeprefix("seconds/"), []).append(seconds)
    means = [(name, sum(s) / len(train), f"{sum(s) / len(train):.2f} s") for name, s in spans.items()]
    total = (summary.get("wall_s") or {}).get("total") or sum(wall.values())
    return {
        "stages": drawn(plots.bar_rows(rows)),
        "spans": drawn(plots.bar_rows(means, "c-process")) if means else None,
        "total": total,
        "peak": summary.get("peak_rss_bytes")
        or max((r.get("peak_rss_bytes", 0) for r in stages.values()), default=None),
    }
