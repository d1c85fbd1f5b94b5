"""The page of one evaluation: success with intervals, task by task, failed starts, videos."""

from pathlib import Path
from typing import Any

from reachrl.report import plots
from reachrl.report.embed import MAX_VIDEO_BYTES, clips_that_fit, films_by_task
from reachrl.report.formats import task_labels
from reachrl.report.pages import drawn, write_page

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
        videos=_videos(folder / "videos", result["modes"]),
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


def _videos(folder: Path, modes: dict[str, Any]) -> dict[str, Any] | None:
    tasks = [task for record in modes.values() for task in record["per_task"]]
    films = films_by_task({path.stem: [path] for path in sorted(folder.glob("*.mp4"))}, tasks)
    if not films:
        return None
    labels = task_labels(list(films), _LABEL_LENGTH)
    clips, left_out = clips_that_fit(films, MAX_VIDEO_BYTES)
    return {
        "clips": [{"label": labels[task]} | shown for task, (shown,) in clips.items()],
        "left_out": left_out,
    }
