"""`reachrl reward inspect`: a page that shows what a reward model thinks of episodes, and how good it is."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reachrl.cli.reward_segments import (
    CameraOption,
    InstructionOption,
    OutOption,
    SetOption,
    labelling,
    stored_section,
)
from reachrl.cli.terminal import Terminal, say
from reachrl.errors import ConfigError

if TYPE_CHECKING:
    from reachrl.config.reward_model import RewardModelSection
    from reachrl.rewards.process.base import RewardModel
    from reachrl.rewards.process.quality import ScoredTrajectory
    from reachrl.types import Trajectory

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder with a fitted reward model, or a reward model's folder.")
]
PathsArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="PATH",
        help="Trajectories or videos in any format that `reward segments` reads; none: the run's held-out ones.",
    ),
]
MostOption = Annotated[int, typer.Option("--max", metavar="N", min=1, help="Episodes drawn in each section.")]
OutcomeOption = Annotated[
    Literal["success", "failure"] | None,
    typer.Option("--outcome", metavar="WHICH", help="Of videos, which do not say it: success or failure."),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-kind",
        metavar="MODULE:CLASS",
        help="Code that the model's folder may name: its kind, or the classes of kind `transformers`; may be repeated.",
    ),
]


def inspect(
    model: ModelArgument,
    paths: PathsArgument = None,
    out: OutOption = Path("inspect.html"),
    most: MostOption = 8,
    instruction: InstructionOption = None,
    camera: CameraOption = None,
    outcome: OutcomeOption = None,
    changes: SetOption = None,
    trusted: TrustOption = None,
) -> None:
    """Score trajectories or videos: curves over the frames, separation, ordering, calibration, false alarms."""
    from reachrl.demos.readers import read_trajectories
    from reachrl.registry import trust
    from reachrl.report.inspect_page import write_inspect_page
    from reachrl.rewards.process.base import load_reward_model
    from reachrl.rewards.process.quality import measure

    for target in trusted or []:
        trust(target)
    folder, sources = find_model(model), paths or [find_audit_set(model)]
    fitted = stored_section(folder.parent / "quality.json", "config")
    config = labelling(changes or [], fitted)
    loaded = load_reward_model(folder)
    known = {"success": True, "failure": False}.get(outcome or "")
    notes: list[str] = []
    if not fitted:
        notes.append(
            "What the model was fitted to is not known, no quality.json lies beside it: labels are made by the "
            "defaults and --set."
        )
    episodes, scored = [], []
    for source in sources:
        for trajectory in read_trajectories(source, instruction=instruction, camera=camera):
            result, labelled = _score(loaded, trajectory, config)
            success = known if trajectory.source == "video" else trajectory.success
            episodes.append(_episode(trajectory, result, success))
            if success is not None:
                scored.append(result)
            if not labelled and "no poses" not in " ".join(notes):
                notes.append("Episodes with no poses (videos) have no labels: calibration leaves them out.")
    if not episodes:
        raise ConfigError(f"{', '.join(map(str, sources))}: nothing to inspect, no trajectory lies there.")
    if len(scored) < len(episodes):
        notes.append(f"The outcome of {len(episodes) - len(scored)} videos is not known; --outcome tells it.")
    quality = measure(scored)
    tasks = sorted({each.task for each in scored})
    per_task = {task: measure([each for each in scored if each.task == task]) for task in tasks}
    what = f"{loaded.kind()} model in {folder}; {len(episodes)} episodes from {', '.join(map(str, sources))}; "
    what += f"labels: {config.label}"
    write_inspect_page(out, episodes, quality=quality, per_task=per_task, model=what, notes=notes, most=most)
    _print(quality, per_task)
    say(f"{out}")


def find_model(path: Path) -> Path:
    """The newest version of a run's reward model, or the folder itself.

    Raises:
        ConfigError: no reward model lies there.
    """
    versions = sorted(path.glob("reward_model/version_*/model"))
    for folder in [*reversed(versions), path / "reward_model" / "model", path / "model", path]:
        if (folder / "config.json").is_file() and not (folder / "metrics.jsonl").exists():
            return folder
    raise ConfigError(
        f"{path}: no reward model lies here; expected a run folder whose `reward fit` stage is done, or the folder of "
        "a fitted model (config.json and weights)."
    )


def find_audit_set(path: Path) -> Path:
    """The held-out trajectories of a run.

    Raises:
        ConfigError: there are none; then trajectories must be named.
    """
    audit = path / "reward_model" / "audit.parquet"
    if not audit.is_file():
        raise ConfigError(
            f"{path}: no held-out trajectories (reward_model/audit.parquet) lie here; name what to inspect: a run "
            "folder, a trajectory store, a LeRobot dataset, LIBERO .hdf5 files or videos."
        )
    return audit


def _score(
    model: "RewardModel", trajectory: "Trajectory", config: "RewardModelSection"
) -> "tuple[ScoredTrajectory, bool]":
    """One trajectory's scores, and whether its poses allow labels."""
    import numpy as np

    from reachrl.rewards.process.fit import score_trajectories
    from reachrl.rewards.process.label import label_trajectory

    labelled = bool(np.isfinite(trajectory.ee_state).all())
    nothing = np.full(len(trajectory.frames), np.nan, np.float32)
    labels = label_trajectory(trajectory, config) if labelled else nothing
    return score_trajectories(model, [trajectory], [labels], batch_size=32)[0], labelled


def _episode(trajectory: "Trajectory", result: "ScoredTrajectory", success: bool | None) -> Any:
    import numpy as np

    from reachrl.report.inspect_page import InspectedEpisode
    from reachrl.rewards.process.quality import spearman

    start = trajectory.start
    return InspectedEpisode(
        task=start.task,
        about=f"{start.split} start {start.index}, {trajectory.source}",
        instruction=trajectory.instruction,
        success=success,
        images=trajectory.frames,
        scores=result.scores,
        labels=result.labels,
        order=spearman(result.scores, np.arange(len(result.scores), dtype=np.float64)),
    )


def _print(quality: dict[str, Any], per_task: dict[str, dict[str, Any]]) -> None:
    """The figures as a table on the terminal."""
    from rich.table import Column, Table

    keys = ("successes", "failures", "auc", "rank_correlation", "false_positive_rate", "false_alarm_rate")
    heads = ("won", "lost", "AUC", "rank corr.", "false pos.", "false alarms")
    table = Table(Column("task", no_wrap=True), *heads, box=None, header_style="bold")
    rows: Iterable[tuple[str, dict[str, Any]]] = [*per_task.items(), ("all", quality)]
    for name, figures in rows:
        table.add_row(name, *(_shown(figures.get(key)) for key in keys))
    Terminal().print(table)


def _shown(number: float | None) -> str:
    if number is None:
        return "-"
    return str(number) if isinstance(number, int) else f"{number:.3f}"
