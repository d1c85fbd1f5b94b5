"""The report: one HTML file that needs no network, made from what the run folder holds."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from reachrl.config.values import flat
from reachrl.errors import StorageError
from reachrl.report import plots
from reachrl.report.diagnosis import Diagnosis, diagnose
from reachrl.report.embed import MAX_VIDEO_BYTES, clips_that_fit, films_by_task
from reachrl.report.pages import drawn, render_page, two_widths
from reachrl.report.robust_page import card
from reachrl.report.sections import (
    alarm_section,
    conversation_section,
    curriculum_section,
    loss_chart,
    reward_model_section,
    timing_section,
)
from reachrl.report.series import TimeAxis, rate_of, thinned, time_axes
from reachrl.report.timeline import timeline_section
from reachrl.report.verdict import advice, verdict
from reachrl.run.atomic import utf8, write_bytes_atomic
from reachrl.run.configuration import read_history
from reachrl.run.metrics import records_by_kind
from reachrl.run.records import (
    AnyObject,
    Conversation,
    Evaluation,
    Provenance,
    RobustnessRecord,
    Stages,
    Summary,
    read_record,
)

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
    records = records_by_kind(run_path / "metrics.jsonl")
    train = records["train"]
    axes = time_axes(train)
    evals = {name: _read(run_path / "eval" / f"{name}.json", Evaluation) or {} for name in ("before", "after")}
    return render_page(
        "report.html.j2",
        name=run_path.resolve().name,
        provenance=provenance,
        trained=_training(provenance),
        summary=summary,
        caveats=summary.get("caveats", []),
        headline=_headline(summary, evals),
        learning=_learning(records, axes, evals),
        tasks=_tasks(evals),
        robustness=card(_read(run_path / "robust" / "robust.json", RobustnessRecord)),
        videos=_videos(run_path, evals),
        conversation=conversation_section(turns),
        curriculum=curriculum_section(train),
        reward_model=reward_model_section(records["reward_model"], summary.get("reward_model")),
        alarm=alarm_section(run_path, train),
        pays_process=not train or any(record.get("reward/process") is not None for record in train),
        warm_start=loss_chart(records["sft"], 960),
        panels=_panels(train, axes),
        diagnosis=_diagnosis(records, config),
        timing=timing_section(summary, stages, train),
        timeline=timeline_section(run_path),
        config=sorted(flat(config).items()) if config else None,
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


def _training(provenance: dict) -> dict[str, Any]:
    """Where the trained weights come from: the stage `train` if it is recorded, else the earliest command."""
    stages = provenance.get("stages") or {}
    return stages.get("train") or next(iter(provenance.get("earlier", [])), provenance)


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
    rate, (low, high) = rate_of(record)
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
    best, first_mode = summary.get("best"), modes[0]
    return {
        "modes": modes,
        "chart": two_widths(
            plots.success_interval_chart, rows, label_width=max(128, 8 * max(len(row[0]) for row in rows))
        ),
        "advice": advice(first_mode["before"], first_mode["after"]),
        "paired": summary.get("paired_test"),
        "verdict": verdict(
            first_mode["before"], first_mode["after"], summary.get("paired_test"), seed=summary.get("seed")
        ),
        "best": best and best | {"last": best["iteration"] == best["of"]},
    }


def _learning(records: dict[str, list[dict]], axes: Sequence[TimeAxis], evals: dict) -> dict[str, Any] | None:
    train = records["train"]
    # `heldout`: evaluations during training by an earlier version, which played starts of the final evaluation.
    logged = [r for kind in ("heldout", "eval") for r in records[kind] if "k" in r and "iteration" in r]
    validation = [r for r in records["validation"] if "k" in r and "iteration" in r]
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
    charts = []
    for axis in axes:
        drawings = {
            narrow: plots.learning_curve(train, points, validation, axis=axis, narrow=narrow)
            for narrow in (False, True)
        }
        window = drawings[False][1]
        charts.append({"css": axis.css, "chart": two_widths(lambda narrow, made=drawings: made[narrow][0])})
    steps = max((r.get("env_steps") or 0 for r in train), default=0)
    return {
        "charts": charts,
        "axes": [{"css": axis.css, "label": axis.label} for axis in axes],
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
            charts.append({"mode": mode, "chart": two_widths(plots.task_chart, before, after)})
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


def _diagnosis(records: dict[str, list[dict]], config: dict | None) -> Diagnosis | None:
    """Why the run does not learn, as its last iterations show it; None where it does."""
    env = (config or {}).get("env") or {}
    return diagnose(
        records["train"],
        after=(config or {}).get("explain_after", 10),
        demos=next(iter(records["demos"]), None),
        max_steps=env.get("max_steps"),
    )


def _panels(train: Sequence[dict], axes: Sequence[TimeAxis]) -> list[dict[str, Any]] | None:
    panels = []
    # A plug-in's reward has parts of its own names.
    own = dict.fromkeys(key for record in train for key in record if key.startswith("reward/"))
    parts = [key for key in own if key not in {known for _, known, _ in PANELS}]
    for title, key, form in (
        *PANELS,
        *((f"{key.removeprefix('reward/')} reward a step", key, "zero") for key in parts),
    ):
        if all(record.get(key) is None for record in train):
            continue
        charts = []
        known = thinned([(record["iteration"], record.get(key)) for record in train])
        for axis in axes:
            points = [(axis.at(iteration), number) for iteration, number in known]
            picture = plots.panel([(title, "c-after", points)], x_label=axis.label, zero=form == "zero")
            charts.append({"css": axis.css, "chart": drawn(picture)})
        panels.append({"title": title, "key": key, "charts": charts})
    return panels or None
