"""`reachrl reward segments`: a page that shows where trajectories are cut and where their keyframes lie."""

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reachrl.cli.terminal import say
from reachrl.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from reachrl.config.reward_model import RewardModelSection
    from reachrl.demos.readers import StateColumns
    from reachrl.report.segments_page import Row, SegmentedTrajectory
    from reachrl.types import Trajectory

PathArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A run folder, a store or one of its shards, LIBERO .hdf5 files, or a LeRobot dataset.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")]
MaxOption = Annotated[int, typer.Option("--max", metavar="N", min=0, help="The first N trajectories; 0: all.")]
InstructionOption = Annotated[
    str | None, typer.Option("--instruction", metavar="TEXT", help="The sentence, in place of the stored ones.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A threshold, such as gripper_change=0.2; may be repeated."),
]
CameraOption = Annotated[str | None, typer.Option("--camera", metavar="KEY", help="Which camera's frames.")]
StateOption = Annotated[
    str | None, typer.Option("--state", metavar="KEY", help="LeRobot: the feature that holds the end effector.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option("--columns", metavar="N,N,...", help="LeRobot: which numbers of it are x, y, z and the gripper."),
]
GripperRangeOption = Annotated[
    str | None,
    typer.Option("--gripper-range", metavar="A,B", help="LeRobot: gripper readings that mean closed and open."),
]
_THRESHOLDS = ("gripper_change", "min_segment", "keyframe_speed", "label")
# Of the section `reward_model`: what labels depend on, whatever the kind of model.
_LABEL_OPTIONS = (
    *_THRESHOLDS,
    *("progress_by", "keyframe_window", "event_delay", "event_window", "event_last", "event_stride"),
)


def segments(
    path: PathArgument,
    out: OutOption = Path("segments.html"),
    most: MaxOption = 100,
    instruction: InstructionOption = None,
    changes: SetOption = None,
    camera: CameraOption = None,
    state: StateOption = None,
    columns: ColumnsOption = None,
    gripper_range: GripperRangeOption = None,
) -> None:
    """Draw cuts and keyframes of stored trajectories over speed and gripper, with the frames at each; one HTML page."""
    config = labelling(changes or [], stored_section(path / "config.json", "reward_model"))
    from reachrl.demos.readers import read_trajectories
    from reachrl.report.segments_page import page_facts, write_segments_page

    where = state_columns(state, columns, gripper_range)
    stored = read_trajectories(path, instruction=instruction, camera=camera, state=where)
    notes: list[str] = []
    watch = _Watch()
    rows = list(_rows(itertools.islice(stored, most or None), config, watch, notes))
    if not rows:
        reason = notes[0] if notes else "it holds no trajectory."
        raise ConfigError(f"{path}: nothing to draw: {reason}")
    for note in notes:
        say(f"warning: {note}", err=True)
    if most and len(rows) + watch.skipped == most and next(stored, None) is not None:
        notes.append(f"Only the first {_counted(most)} of those stored are shown; --max changes that.")
    means = page_facts(rows)
    facts = [
        (f"{len(rows)}", "trajectories" if len(rows) != 1 else "trajectory"),
        (f"{means['segments']:.2f}", "segments of each, on average"),
        (f"{means['keyframes']:.2f}", "keyframes of each, on average"),
        (f"{means['uncut']}", "without a gripper change"),
        (f"{watch.seconds:.2g} s", f"to label {watch.decisions:,} decisions"),
    ]
    shown = [*_THRESHOLDS, *sorted(config.model_dump(exclude_defaults=True).keys() - {*_THRESHOLDS, "kind"})]
    options = [(name, f"{getattr(config, name)}") for name in shown]
    write_segments_page(out, rows, source=str(path), facts=facts, options=options, notes=notes)
    say(
        f"{_counted(len(rows))}: on average {means['segments']:.2f} segments and "
        f"{means['keyframes']:.2f} keyframes, {means['uncut']} without a gripper change; "
        f"labelled in {watch.seconds:.2g} s"
    )
    say(f"{out}")


def stored_section(file: Path, key: str) -> dict[str, Any]:
    """The section that a run keeps in a JSON file; empty where there is none.

    Args:
        file: the run's `config.json` or a reward model's `quality.json`; it need not be there, or be a run's.
        key: of the section in it.

    Raises:
        StorageError: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        section = json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{file}: damaged ({error}); expected JSON that says how trajectories are labelled under {key!r}. Put the "
            "file back, or delete it to label by the defaults and --set."
        ) from error
    return section if isinstance(section, dict) else {}


def labelling(changes: Iterable[str], stored: Mapping[str, Any] | None = None) -> "RewardModelSection":
    """The options of the labels: the defaults, what a run was given, and `key=value` changes.

    Args:
        changes: keys of the section `reward_model`, with or without that word before them.
        stored: that section as a run keeps it; only what labels depend on is taken from it.

    Raises:
        ConfigError: an unknown key or a wrong value; the message names it.
    """
    from reachrl.config.loading import validate

    section: dict[str, Any] = {key: value for key, value in (stored or {}).items() if key in _LABEL_OPTIONS}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {change!r} is not of the form key=value, for example gripper_change=0.2.")
        section[key.strip().removeprefix("reward_model.")] = value.strip()
    return validate({"reward_model": section}, where="--set").reward_model


def state_columns(feature: str | None, columns: str | None, gripper_range: str | None) -> "StateColumns":
    """Where a LeRobot dataset keeps the end effector, as it was typed.

    Args:
        feature: name of the stored vector.
        columns: numbers parted by commas.
        gripper_range: two numbers parted by a comma.

    Raises:
        ConfigError: not numbers, or not as many as are needed.
    """
    from reachrl.demos.readers import StateColumns

    try:
        places = None if columns is None else tuple(int(number) for number in columns.split(","))
    except ValueError as error:
        raise ConfigError(f"--columns {columns!r}: expected whole numbers such as 0,1,2,6 or 0,1,2,6,7.") from error
    try:
        closed, opened = (0.0, 1.0) if gripper_range is None else map(float, gripper_range.split(","))
    except ValueError as error:
        raise ConfigError(f"--gripper-range {gripper_range!r}: expected two numbers such as 0,0.08.") from error
    known = None if gripper_range is None else (closed, opened)
    return StateColumns(feature=feature, columns=places, gripper_range=known)


class _Watch:
    """Counts labelled decisions and the seconds spent on labelling alone."""

    def __init__(self) -> None:
        self.seconds, self.decisions, self.skipped = 0.0, 0, 0


def _rows(
    trajectories: Iterable["Trajectory"], config: "RewardModelSection", watch: _Watch, notes: list[str]
) -> Iterator["Row"]:
    """Each trajectory drawn, one in memory at a time; those without poses are counted and told in `notes`."""
    import numpy as np

    from reachrl.report.segments_page import draw_row

    without: list[str] = []
    for trajectory in trajectories:
        if np.isfinite(trajectory.ee_state).all():
            yield draw_row(_segmented(trajectory, config, watch))
        else:
            without.append(f"{trajectory.start.task} start {trajectory.start.index} ({trajectory.source})")
    watch.skipped = len(without)
    if without:
        notes.append(
            f"{_counted(len(without))} left out: no finite end-effector poses, which cuts and keyframes need; "
            f"the first is {without[0]}. Videos have none: use demonstrations or rollouts."
        )


def _counted(trajectories: int) -> str:
    return f"{trajectories} trajector{'y' if trajectories == 1 else 'ies'}"


def _segmented(trajectory: "Trajectory", config: "RewardModelSection", watch: _Watch) -> "SegmentedTrajectory":
    """One trajectory with its milestones and labels, as the page draws it."""
    from reachrl.report import segments_page
    from reachrl.rewards.process.label import label_trajectory, segment_trajectory
    from reachrl.rewards.process.segment import arm_speed

    began = time.perf_counter()
    labels = label_trajectory(trajectory, config)
    watch.seconds += time.perf_counter() - began
    watch.decisions += len(trajectory.actions)
    milestones = segment_trajectory(trajectory, config)
    speed, rest = arm_speed(trajectory.ee_state[:, :3], keyframe_speed=config.keyframe_speed)
    return segments_page.SegmentedTrajectory(
        name=trajectory.start.task,
        about=f"{trajectory.start.split} start {trajectory.start.index}, {trajectory.source}",
        instruction=trajectory.instruction,
        success=trajectory.success,
        images=trajectory.frames,
        opening=trajectory.ee_state[:, 3],
        speed=speed,
        rest=rest,
        labels=labels,
        bounds=milestones.bounds,
        keyframes=milestones.keyframes,
    )
