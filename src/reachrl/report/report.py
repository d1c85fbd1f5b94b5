"""The report: one HTML file that needs no network, made from what the run folder holds."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from reachrl.errors import StorageError
from reachrl.report import plots
from reachrl.report.embed import MAX_VIDEO_BYTES, clips_that_fit, films_by_task
from reachrl.report.formats import duration, gibibytes
from reachrl.report.pages import drawn, render_page
from reachrl.report.timeline import timeline_section
from reachrl.run.atomic import utf8, write_bytes_atomic
from reachrl.run.configuration import flatten_config, read_history
from reachrl.run.metrics import read_metrics
from reachrl.run.records import (
    AnyObject,
    Conversation,
    Evaluation,
    Provenance,
    Stages,
    Summary,
    read_record,
)

MAX_TURNS = 60

# (title, metric, how it is read); drawn where the training records carry the metric.
PANELS = (
    ("policy loss", "loss/policy", ""),
    ("value loss", "loss/value", "zero"),
    ("entropy of the action tokens", "entropy", "zero"),
    ("KL of the update, nats a token", "kl", "zero"),
    ("share cut by the clip", "clip_frac", "zero"),
    ("gradient norm", "grad_norm", "zero"),
    ("explained variance of the critic", "explained_variance", "zero"),
    ("sampler against learner, KL a token", "engine_kl", "zero"),
    ("episode length, decisions", "episode_length", "zero"),
    ("share of malformed answers", "malformed_rate", "zero"),
    ("task reward a step", "reward/task", "zero"),
    ("process reward a step", "reward/process", "zero"),
    ("progress score of successes", "audit/success_score", "zero"),
    ("progress score of failures", "audit/failure_score", "zero"),
    ("correlation of score and success", "audit/score_correlation", "zero"),
    ("correlation of return and success", "audit/return_correlation", "zero"),
)
ACTION_NAMES = {
    4: ("dx", "dy", "dz", "gripper"),
    7: ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
}


def _read(path: Path, shape: type[BaseModel]) -> Any:
    """Return a JSON file's content, or None where the stage that writes it has not run."""
    if not path.exists():
        return None
    return read_record(path, shape, remedy="delete it and run its stage again")


def write_report(run_path: Path | str) -> Path:
    """Write `report.html` into a run folder; parts that have not run say so.

    Args:
        run_path: The run folder.

    Returns:
        Path of the report.

    Raises:
        StorageError: A file of the run is damaged, or the report cannot be written.
    """
    run_path = Path(run_path)
    if not run_path.is_dir():
        raise StorageError(f"run folder {run_path} does not exist; expected a folder made by an earlier stage")
    path = run_path / "report.html"
    write_bytes_atomic(path, utf8(render_report(run_path)))
    return path


def render_report(run_path: Path) -> str:
    """Return the report's HTML for a run folder."""
    summary = _read(run_path / "summary.json", Summary) or {}
    provenance = _read(run_path / "provenance.json", Provenance) or {}
    config = _read(run_path / "config.json", AnyObject)
    # Everything is read, and so checked, before anything is drawn.
    stages = _read(run_path / "stages.json", Stages) or {}
    turns = _read(run_path / "conversation.json", Conversation)
    train = read_metrics(run_path / "metrics.jsonl", "train")
    evals = {name: _read(run_path / "eval" / f"{name}.json", Evaluation) or {} for name in ("before", "after")}
    return render_page(
        "report.html.j2",
        name=run_path.resolve().name,
        provenance=provenance,
        summary=summary,
        caveats=summary.get("caveats", []),
        headline=_headline(summary, evals),
        learning=_learning(run_path, train, evals),
        tasks=_tasks(evals),
        videos=_videos(run_path, evals),
        conversation=_conversation(turns),
        curriculum=_curriculum(train),
        reward_model=_reward_model(run_path, summary.get("reward_model")),
        alarm=_alarm(run_path, train),
        warm_start=_losses(run_path, "sft", 960),
        panels=_panels(train),
        timing=_timing(summary, stages, train),
        timeline=timeline_section(run_path),
        config=sorted(flatten_config(config).items()) if config else None,
        changes=read_history(run_path),
        origin=provenance.get("from"),
        unfinished=_unfinished(config, stages, train),
        commands=_commands(provenance),
    )


def _unfinished(config: dict | None, stages: dict, train: Sequence[dict]) -> dict[str, int] | None:
    """How far training has come where it has not ended; None where it has, or has not begun."""
    ended = (stages.get("train") or {}).get("done", False)
    if ended or not train or not config or "num_iterations" not in config:
        return None
    return {"done": train[-1]["iteration"] + 1, "of": config["num_iterations"]}


def _commands(provenance: dict) -> list[str]:
    """Return the commands that made the run, the earliest first, each once."""
    attempts = [*provenance.get("earlier", []), provenance]
    return list(dict.fromkeys(shlex.join(a["command"]) for a in attempts if a.get("command")))


def _result(summary: dict, evals: dict, when: str, mode: str) -> dict[str, Any] | None:
    """Return a {k, n, rate, wilson95} record with rate and interval filled in, or None."""
    record = summary.get(f"success_{when}_{mode}") or evals[when].get(mode)
    if not record and mode == summary.get("mode", "greedy"):
        record = summary.get(f"success_{when}")
    if not record:
        return None
    rate, (low, high) = plots.rate_of(record)
    return {"k": record["k"], "n": record["n"], "rate": rate, "wilson95": [low, high]}


def _headline(summary: dict, evals: dict) -> dict[str, Any] | None:
    first = summary.get("mode", "greedy")
    tests = {entry["mode"]: entry for entry in summary.get("temperatures", [])}
    modes = [
        {
            "mode": mode,
            "before": _result(summary, evals, "before", mode),
            "after": _result(summary, evals, "after", mode),
            "paired": tests.get(mode, {}).get("paired_test"),
            "against_headline": tests.get(mode, {}).get("against_headline"),
        }
        for mode in dict.fromkeys([first, *tests, *evals["before"], *evals["after"], "greedy", "sampled"])
    ]
    modes = [entry for entry in modes if entry["before"] or entry["after"]]
    if not modes:
        return None
    rows = [
        (f"{when}, {entry['mode']}", entry[when], f"c-{when}")
        for entry in modes
        for when in ("before", "after")
        if entry[when]
    ]
    return {"modes": modes, "chart": drawn(plots.success_interval_chart(rows)), "paired": summary.get("paired_test")}


def _learning(run_path: Path, train: Sequence[dict], evals: dict) -> dict[str, Any] | None:
    # `heldout`: evaluations during training by an earlier version, which played starts of the final evaluation.
    found = [r for kind in ("heldout", "eval") for r in read_metrics(run_path / "metrics.jsonl", kind)]
    validation = [r for r in read_metrics(run_path / "metrics.jsonl", "validation") if "k" in r and "iteration" in r]
    logged = [r for r in found if "k" in r and "iteration" in r]
    # A repeated evaluation counts once, as it came out last.
    points = list({(r["iteration"], r.get("mode", "greedy")): r for r in logged}.values())
    last = max((r["iteration"] for r in train), default=None)
    for when, iteration in (("before", 0), ("after", last)):
        for mode, record in evals[when].items():
            known = [p["iteration"] for p in points if p.get("mode", "greedy") == mode]
            there = 0 in known if when == "before" else last is not None and any(i >= max(last, 1) for i in known)
            if iteration is not None and record.get("n") and not there:
                points.append({**record, "iteration": iteration, "mode": mode})
    if not train and not points and not validation:
        return None
    picture, window = plots.learning_curve(train, points, validation)
    steps = max((r.get("env_steps") or 0 for r in train), default=0)
    return {
        "chart": drawn(picture),
        "window": window,
        "env_steps": steps,
        "iterations": len(train),
        "weighed": any(r.get("success_uniform") is not None for r in train),
        "key": plots.curve_colours(points, validation),
    }


def _tasks(evals: dict) -> list[dict[str, Any]] | None:
    charts = []
    for mode in dict.fromkeys([*evals["before"], *evals["after"]]):
        before, after = ((evals[when].get(mode) or {}).get("per_task") or {} for when in ("before", "after"))
        if before or after:
            charts.append({"mode": mode, "chart": drawn(plots.task_chart(before, after))})
    return charts or None


def _videos(run_path: Path, evals: dict) -> dict[str, Any] | None:
    folder = run_path / "videos"
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.mp4")) if folder.is_dir() else ():
        when, _, task = path.stem.partition("_")
        if when in ("before", "after") and task:
            found.setdefault(task, {})[when] = path
    if not found:
        return None
    tasks = [task for record in evals["after"].values() for task in record.get("per_task", {})]
    found = films_by_task(found, tasks)
    films = {task: list(found[task].values()) for task in found}
    clips, left_out = clips_that_fit(films, MAX_VIDEO_BYTES)
    rows = [{"task": task, "clips": dict(zip(found[task], shown, strict=True))} for task, shown in clips.items()]
    return {"rows": rows, "left_out": left_out}


def _conversation(record: dict | None) -> dict[str, Any] | None:
    if not record or not record.get("turns"):
        return None
    turns = record["turns"]
    dimensions = len(turns[0].get("action") or ())
    names = ACTION_NAMES.get(dimensions, tuple(f"a{i}" for i in range(dimensions)))
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


def _curriculum(train: Sequence[dict]) -> list[dict[str, Any]] | None:
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
        maps.append({"title": title, "chart": drawn(plots.heat_map(rows, top=top, form="share" if share else "plain"))})
    return maps or None


def _losses(run_path: Path, kind: str, width: int) -> Any | None:
    """Draw training and held-out loss of the warm start or the reward model."""
    records = read_metrics(run_path / "metrics.jsonl", kind)
    series = [
        (name, colour, plots.block_means({r["step"]: r[key] for r in records if "step" in r and key in r}))
        for name, colour, key in (("training", "c-train", "train_loss"), ("held out", "c-after", "heldout_loss"))
    ]
    series = [entry for entry in series if entry[2]]
    return drawn(plots.panel(series, x_label="step", width=width, height=240)) if series else None


def _reward_model(run_path: Path, record: dict | None) -> dict[str, Any] | None:
    losses = _losses(run_path, "reward_model", 520)
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


def _alarm(run_path: Path, train: Sequence[dict]) -> dict[str, Any] | None:
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


def _panels(train: Sequence[dict]) -> list[dict[str, Any]] | None:
    charts = []
    for title, key, form in PANELS:
        points = [(record["iteration"], record.get(key)) for record in train]
        if any(y is not None for _, y in points):
            series = [(title, "c-after", points)]
            charts.append(
                {
                    "title": title,
                    "key": key,
                    "chart": drawn(plots.panel(series, x_label="iteration", zero=form == "zero")),
                }
            )
    return charts or None


def _timing(summary: dict, stages: dict, train: Sequence[dict]) -> dict[str, Any] | None:
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
