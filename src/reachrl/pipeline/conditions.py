"""What a robustness measurement plays: plain episodes, and the same ones perturbed, by axis and level."""

from collections.abc import Iterable
from dataclasses import dataclass

from reachrl.config.env import EnvSection
from reachrl.config.perturbations import chosen_variants
from reachrl.types import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of an axis."""

    label: str
    """With its unit."""
    starts: tuple[Start, ...]
    """The perturbed episodes; `Start.plain` is what each is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One axis."""

    axis: str
    what: str
    """What changes."""
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """All episodes of a measurement."""

    name: str
    """Of the suite of perturbations."""
    axes: tuple[Condition, ...]
    caveats: tuple[str, ...] = ()

    @property
    def plain(self) -> tuple[Start, ...]:
        """The unperturbed episodes, each once."""
        starts = (start.plain for axis in self.axes for level in axis.levels for start in level.starts)
        return tuple(dict.fromkeys(starts))

    def starts(self) -> list[Start]:
        """Every episode, the unperturbed ones first."""
        return [*self.plain, *(start for axis in self.axes for level in axis.levels for start in level.starts)]


def own_conditions(env: EnvSection, asked: str | None, episodes: int, seed: int) -> Conditions:
    """The environment's own axes on its held-out starts.

    Args:
        env: the environment.
        asked: `camera,light=1`; None: every axis it has, at every level.
        episodes: start states of each task.
        seed: of what is random in a perturbation.

    Raises:
        ConfigError: unknown axis or level.
    """
    chosen = chosen_variants(asked, env.axes, env.kind, seed)
    places = [(task, index) for index in range(episodes) for task in env.tasks]
    axes = [
        Condition(
            axis=name,
            what=env.axes[name].what,
            levels=tuple(
                Level(
                    label=f"{variant.value:g} {env.axes[name].unit}",
                    starts=tuple(Start(task, "eval", index, str(variant)) for task, index in places),
                )
                for variant in variants
            ),
        )
        for name, variants in chosen.items()
    ]
    return Conditions(name=env.kind, axes=tuple(axes), caveats=tuple(trained_on(env, chosen)))


def trained_on(env: EnvSection, axes: Iterable[str]) -> list[str]:
    """What has to be said where training varied the axes that are measured."""
    both = [axis for axis in axes if axis in env.randomise.axes]
    return [f"trained with other values of {', '.join(both)} (env.randomise)"] if both else []
