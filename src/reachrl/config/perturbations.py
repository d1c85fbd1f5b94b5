"""Perturbations of an episode: axes with their levels, and how a start names one.

Levels that are evaluated and values that training draws (`env.randomise`) are different numbers on every axis.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

import numpy as np
from pydantic import Field

from reachrl.config.base import Section
from reachrl.errors import ConfigError
from reachrl.streams import Stream, generator
from reachrl.types import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One way in which an episode may differ from those of training."""

    what: str
    """What changes, in a few words."""
    unit: str
    """Of a level."""
    levels: tuple[float, ...]
    """Those that are evaluated, the mildest first."""
    training: tuple[float, ...]
    """Those that `env.randomise` draws from; none of them is evaluated."""


LANGUAGE = Axis(
    what="the instruction in other words: with a polite frame, with synonyms, reworded",
    unit="of 3 kinds of rewording",
    levels=(1, 2, 3),
    training=(4, 5, 6),
)
NOISE = Axis(
    what="Gaussian noise on every pixel of every camera, new in each frame",
    unit="grey levels of 255, standard deviation",
    levels=(10, 20, 40),
    training=(5, 15, 30),
)
DELAY = Axis(
    what="actions are carried out later than chosen; until the first arrives, the robot rests",
    unit="control steps",
    levels=(2, 4),
    training=(1, 3),
)
GENERAL_AXES: Mapping[str, Axis] = {"language": LANGUAGE, "noise": NOISE, "delay": DELAY}
"""Those that need nothing of the simulator."""

CAMERA = Axis(
    what="fixed cameras turned about the vertical through the middle of the workspace, to the left or right",
    unit="degrees",
    levels=(5, 10, 20),
    training=(3, 7.5, 15),
)
LIGHT = Axis(
    what="all lights brighter or darker",
    unit="stops (factors of 2)",
    levels=(0.5, 1, 2),
    training=(0.25, 0.75, 1.5),
)
COLOUR = Axis(
    what="each colour of the scene and the robot mixed with a random one; objects keep theirs where the instruction "
    "names a colour",
    unit="share of the random colour",
    levels=(0.25, 0.5, 1),
    training=(0.15, 0.35, 0.75),
)
TEXTURE = Axis(
    what="a random two-coloured pattern printed over the textures of table, floor and walls",
    unit="share of the pattern",
    levels=(0.25, 0.5, 1),
    training=(0.15, 0.35, 0.75),
)
DISTRACTORS = Axis(
    what="other things on the table, away from the task's and from the hand's way to them",
    unit="things",
    levels=(1, 2, 4),
    training=(3, 5),
)
START = Axis(
    what="one coordinate of the start lies beyond the region of training starts",
    unit="share of the region's extent",
    levels=(0.1, 0.2, 0.4),
    training=(0.05, 0.15, 0.3),
)


@dataclass(frozen=True, slots=True)
class PublishedTask:
    """One perturbed task of a published robustness suite; as text `suite:name`."""

    suite: str
    """One of `EnvSection.suites`."""
    name: str
    """Which of its tasks, beside the start's own."""

    def __str__(self) -> str:
        return f"{self.suite}:{self.name}"

    @classmethod
    def of(cls, start: Start) -> "PublishedTask | None":
        """That of a start; None where it names none."""
        suite, colon, name = start.variant.partition(":")
        return cls(suite, name) if colon else None


@dataclass(frozen=True, slots=True)
class Variant:
    """One perturbation of one episode; as text `axis=value`, or `axis=value#draw`."""

    axis: str
    value: float
    draw: int = 0
    """Which of many draws of what is random in it: to the left or right, which colours."""

    def __str__(self) -> str:
        return f"{self.axis}={self.value:g}" + (f"#{self.draw}" if self.draw else "")

    @classmethod
    def of(cls, start: Start) -> "Variant | None":
        """That of a start; None where nothing is changed, or a published suite says what (`PublishedTask`).

        Raises:
            ValueError: `start.variant` is no variant.
        """
        if not start.variant or PublishedTask.of(start) is not None:
            return None
        axis, _, rest = start.variant.partition("=")
        value, _, draw = rest.partition("#")
        return cls(axis, float(value), int(draw or 0))

    def generator(self, start: Start, *more: int) -> np.random.Generator:
        """For what is random in `start`: the same at all levels of an axis, so that a higher one is further out."""
        key = (self.axis, start.task, start.split, start.index)
        return generator(self.draw, Stream.PERTURBATION, *key, *more)


class RandomiseSection(Section):
    """Perturbed episodes among those that are learned from; off unless axes are named."""

    axes: tuple[str, ...] = ()
    """What varies, such as `camera,light,noise`; each perturbed episode draws one of them, and one of its values that
    are never evaluated. `reachrl robust` measures the same axes at other values. Empty: nothing varies."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the episodes that are perturbed; the others stay as they are."""

    def varied(self, start: Start, axes: Mapping[str, Axis], seed: int, stream: Stream, *address: int | str) -> Start:
        """`start`, perhaps perturbed; what is drawn depends on the seed and the address of the episode alone.

        Args:
            start: of the episode.
            axes: of its environment.
            seed: of the run.
            stream: what the episode is for.
            address: of the episode, such as its number.
        """
        if not self.axes:
            return start
        rng = generator(seed, stream, *address)
        perturbed, axis = rng.random() < self.share, self.axes[int(rng.integers(len(self.axes)))]
        values = axes[axis].training
        variant = Variant(axis, values[int(rng.integers(len(values)))], int(rng.integers(1, 2**31)))
        return Start(start.task, start.split, start.index, str(variant)) if perturbed else start

    def check(self, key: str, axes: Mapping[str, Axis], kind: str) -> None:
        """Refuse an axis that the environment does not have.

        Raises:
            ConfigError: it, and what there is.
        """
        for axis in self.axes:
            check_axis(f"{key}.axes", axis, axes, kind)


def check_axis(key: str, axis: str, axes: Collection[str], kind: str) -> None:
    """Refuse an axis that an environment, or a suite, does not have.

    Raises:
        ConfigError: it, and what there is.
    """
    if axis not in axes:
        close = get_close_matches(axis[:100], axes, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{key}: {kind} has no axis {axis[:100]!r}; {hint}it has {', '.join(axes)}")


def chosen_variants(asked: str | None, axes: Mapping[str, Axis], kind: str, draw: int) -> dict[str, list[Variant]]:
    """The variants of each axis that `camera,light=1` asks for.

    Args:
        asked: names, with all levels, and `name=level`; None: all levels of all axes.
        axes: of the environment.
        kind: its name, for messages.
        draw: see `Variant`.

    Raises:
        ConfigError: unknown axis or level; names what there is.
    """
    chosen: dict[str, list[Variant]] = {}
    for part in list(axes) if asked is None else [part.strip() for part in asked.split(",") if part.strip()]:
        name, equals, text = part.partition("=")
        check_axis("--axes", name, axes, kind)
        levels = axes[name].levels
        if equals:
            levels = tuple(level for level in levels if f"{level:g}" == text.strip())
            if not levels:
                there = ", ".join(f"{level:g}" for level in axes[name].levels)
                raise ConfigError(
                    f"--axes {part[:100]}: out of range; {name} has the levels {there} ({axes[name].unit})"
                )
        known = chosen.setdefault(name, [])
        known += [variant for level in levels if (variant := Variant(name, level, draw)) not in known]
    if not chosen:
        raise ConfigError(f"--axes names none; {kind} has {', '.join(axes)}")
    return chosen
