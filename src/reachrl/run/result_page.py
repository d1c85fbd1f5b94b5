"""The page of one evaluation: success with intervals, task by task, failed starts, videos."""

from pathlib import Path
from typing import Any

from reachrl.run import plots
from reachrl.run.formats import task_labels
from reachrl.run.pages import drawn, write_page
from reachrl.run.report import MAX_VIDEO_BYTES
from reachrl.run.video import clip

_LABEL_WIDTH = 210  # pixels
_LABEL_LENGTH = 32  # characters that fit into it


def write_result_page(folder: Path, result: dict[str, Any]) -> Path:
    """Write `result.html` beside a `result.json`.

    Args:
        folder: where the videos are and the page goes.
        result: what `reachrl.pipeline.measure.merge` found.
    """
    return write_page(
        folder / "result.html",
        "result.html.j2",
        result=result,
        modes=[_mode(name, record) for name, record in result["modes"].items()],
        videos=_videos(folder / "videos"),
    )


def _mode(name: str, record: dict[str, Any]) -> dict[str, Any]:
    labels = task_labels(list(record["per_task"]), _LABEL_LENGTH)
    rows = [("all tasks", record, "c-before"), *((labels[t], r, "c-after") for t, r in record["per_task"].items())]
    tasks = [
        {
            "label": labels[task],
            "task": task,
            **figures,
            "failed": [e["start"] for e in record["episodes"] if e["task"] == task and not e["success"]],
        }
        for task, figures in record["per_task"].items()
    ]
    chart = drawn(plots.success_interval_chart(rows, label_width=_LABEL_WIDTH))
    return {"name": name, "record": record, "tasks": tasks, "chart": chart}


def _videos(folder: Path) -> list[dict[str, str]]:
    paths = sorted(folder.glob("*.mp4"))
    labels, room, clips = task_labels([path.stem for path in paths], _LABEL_LENGTH), MAX_VIDEO_BYTES, []
    for path in paths:
        room -= path.stat().st_size
        if room < 0:
            break
        clips.append({"label": labels[path.stem]} | clip(path))
    return clips
