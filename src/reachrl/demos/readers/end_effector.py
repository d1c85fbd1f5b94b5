"""Where a stored state vector keeps the end effector, and what its gripper reading means."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from reachrl.errors import ConfigError

FINGER_TRAVEL = 0.04  # metres each finger of a Franka Panda moves from closed to open
_SLACK = 0.1  # share of the range by which a reading may overshoot before its unit is doubted
_COORDINATE = r"(?:.*[._ /-])?{axis}"  # x, ee_x, eef.pos.x, tcp_x
_NOT_A_POSITION = re.compile(r"quat|rot|orn|ori|angle|vel|force|torque|delta|target|goal|obj", re.IGNORECASE)
_GRIPPER = re.compile(r"gripper|finger", re.IGNORECASE)
_NOT_AN_OPENING = re.compile(r"vel|force|torque|effort|current", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateColumns:
    """Which numbers of a stored state are the end effector's position and its gripper.

    What is left None is found by itself where the data name their columns, and is an error where they do not.
    """

    feature: str | None = None  # the stored vector; None: `observation.state` or `state`
    columns: tuple[int, ...] | None = None  # positions of x, y, z, gripper and, where there is one, a second finger
    gripper_range: tuple[float, float] | None = None  # readings that mean closed and open; two fingers: their distance

    def __post_init__(self) -> None:
        """Check what can be checked before any data are read.

        Raises:
            ConfigError: there are not four or five columns, or the range is empty.
        """
        if self.columns is not None and len(self.columns) not in (4, 5):
            raise ConfigError(
                f"state columns {self.columns}: expected the positions of x, y, z and gripper, such as 0,1,2,6, "
                "or of x, y, z and two fingers, such as 0,1,2,6,7."
            )
        if self.gripper_range is not None and self.gripper_range[0] == self.gripper_range[1]:
            raise ConfigError(f"gripper range {self.gripper_range}: closed and open must be different readings.")


def flat_names(names: Any) -> list[str]:
    """The column names of a LeRobot feature, which are a list, a list under one key, or a position under each name."""
    if isinstance(names, dict):
        if names and all(isinstance(position, int) for position in names.values()):
            return [str(name) for name in sorted(names, key=names.__getitem__)]
        return [name for part in names.values() for name in flat_names(part)]
    if isinstance(names, list | tuple):
        return [str(name) for name in names]
    return []


def named_columns(names: Sequence[str]) -> tuple[int, ...] | None:
    """The positions of x, y, z and one or two gripper readings among column names; None unless that is plain.

    Args:
        names: one name for each number of the state.
    """
    found = []
    for axis in "xyz":
        pattern = re.compile(_COORDINATE.format(axis=axis), re.IGNORECASE)
        places = [i for i, name in enumerate(names) if pattern.fullmatch(name) and not _NOT_A_POSITION.search(name)]
        if len(places) != 1:
            return None
        found += places
    gripper = [i for i, name in enumerate(names) if _GRIPPER.search(name) and not _NOT_AN_OPENING.search(name)]
    return (*found, *gripper) if len(gripper) in (1, 2) else None


def finger_opening(fingers: Float[np.ndarray, "T 2"]) -> Float32[np.ndarray, "T"]:
    """The opening 0..1 of a Panda gripper from its two finger joints in metres, the second counted negative.

    Args:
        fingers: joint positions, each 0 closed to 0.04 (and -0.04) open.
    """
    return np.clip((fingers[:, 0] - fingers[:, 1]) / (2 * FINGER_TRAVEL), 0.0, 1.0).astype(np.float32)


def end_effector(
    state: Float[np.ndarray, "T S"], columns: Sequence[int], gripper_range: tuple[float, float] | None, *, where: str
) -> Float32[np.ndarray, "T 4"]:
    """End-effector x y z in metres and gripper opening 0..1 from the columns of a stored state.

    Without a range one gripper column is an opening 0..1, and two are the finger joints of a Panda in metres.

    Args:
        state: the stored vectors.
        columns: positions of x, y, z and one or two gripper readings.
        gripper_range: readings (distance of the fingers, if there are two) that mean closed and open.
        where: how an error calls this trajectory.

    Raises:
        ConfigError: the state has no such column, or the gripper's readings lie far outside their range.
    """
    width = state.shape[1]
    if bad := [column for column in columns if not -width <= column < width]:
        raise ConfigError(
            f"{where}: the state has {width} numbers, there is no column {bad[0]}; expected 0..{width - 1}."
        )
    xyz, gripper = state[:, list(columns[:3])], state[:, list(columns[3:])]
    two = gripper.shape[1] == 2
    reading = gripper[:, 0] - gripper[:, 1] if two else gripper[:, 0]
    closed, opened = gripper_range or ((0.0, 2 * FINGER_TRAVEL) if two else (0.0, 1.0))
    opening = (reading - closed) / (opened - closed)
    known = opening[np.isfinite(opening)]
    if len(known) and (known.min() < -_SLACK or known.max() > 1 + _SLACK):
        unit = "the distance of the fingers" if two else "the gripper"
        raise ConfigError(
            f"{where}: {unit} reads {reading.min():.4g} to {reading.max():.4g}, expected {closed:g} (closed) to "
            f"{opened:g} (open). Say which readings mean closed and open (`StateColumns.gripper_range`, "
            "--gripper-range), or choose other columns."
        )
    return np.column_stack([xyz, np.clip(opening, 0.0, 1.0)]).astype(np.float32)
