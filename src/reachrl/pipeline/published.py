"""What a published robustness suite plays: its tasks of the environment's tasks, or a stratified sample of them."""

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import TypeVar

from reachrl.config.env import EnvSection
from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_plus import KINDS, NOT_HAD, PROTOCOLS, PlusTask, Protocol, plus_tasks
from reachrl.config.libero_plus_files import check_layouts, check_sentences
from reachrl.config.perturbations import PublishedTask, check_axis
from reachrl.errors import ConfigError
from reachrl.pipeline.conditions import Condition, Conditions, Level
from reachrl.streams import Stream, generator
from reachrl.types import Start

Task = TypeVar("Task")
_START = 0  # upstream plays each task once, from the first stored state of its base task


def plus_conditions(env: EnvSection, protocol: Protocol, asked: str | None, share: Fraction, seed: int) -> Conditions:
    """LIBERO-Plus's tasks that can be had exactly, those of the environment's suite and tasks.

    Args:
        env: the environment.
        protocol: how episodes begin and what is said.
        asked: axes, such as `camera,robot`; None: all.
        share: of the tasks that are played; each level of an axis, and of it each base task, has its share.
        seed: of which are.

    Raises:
        ConfigError: another environment, suite or axis than LIBERO-Plus has, or an edited package.
        MissingExtra: the package is not installed.
    """
    if not isinstance(env, LiberoConfig):
        raise ConfigError(f"--suite plus: LIBERO-Plus perturbs tasks of LIBERO; the policy's env.kind is {env.kind}")
    kinds = suite_axes(asked, "LIBERO-Plus", KINDS, NOT_HAD)
    everything = plus_tasks(env.suite)
    check_sentences(env.suite)
    check_layouts(env.suite)
    tasks = {base: everything[base] for base in env.tasks}
    axes = []
    for kind in kinds:
        levels = sorted({task.level for of_base in tasks.values() for task in of_base if task.kind == kind})
        axes.append(
            Condition(
                axis=kind,
                what=KINDS[kind],
                levels=tuple(_level(tasks, kind, level, protocol, share, seed) for level in levels),
            )
        )
    return Conditions(
        name=f"LIBERO-Plus, {env.suite}, {protocol} protocol",
        axes=tuple(axes),
        caveats=tuple(_caveats(env, protocol, share)),
    )


def suite_axes(asked: str | None, suite: str, kinds: Collection[str], not_had: Collection[str]) -> list[str]:
    """The axes of a suite that `camera,robot` asks for.

    Args:
        asked: names; None: all.
        suite: how the suite is called.
        kinds: what there is.
        not_had: what the suite has and cannot be played.

    Raises:
        ConfigError: another name, or none.
    """
    if asked is None:
        return list(kinds)
    chosen = list(dict.fromkeys(part.strip() for part in asked.split(",") if part.strip()))
    for kind in chosen:
        if kind in not_had:
            raise ConfigError(
                f"--axes {kind}: {suite}'s {kind} tasks are not played: their files are in no package, or not all; "
                f"it has {', '.join(kinds)}"
            )
        check_axis("--axes", kind, kinds, suite)
    if not chosen:
        raise ConfigError(f"--axes names none; {suite} has {', '.join(kinds)}")
    return chosen


def _level(
    tasks: Mapping[str, Sequence[PlusTask]], kind: str, level: str, protocol: Protocol, share: Fraction, seed: int
) -> Level:
    of_base = {
        base: [Start(base, "eval", _START, str(PublishedTask(PROTOCOLS[protocol], task.name))) for task in found]
        for base, among in tasks.items()
        if (found := [task for task in among if task.kind == kind and task.level == level])
    }
    return sampled_level(of_base, share, seed, kind, level)


def sampled_level(groups: Mapping[str, Sequence[Start]], share: Fraction, seed: int, kind: str, level: str) -> Level:
    """A level of an axis with a share of its episodes, of each base task its part; see `sampled`."""
    played, count = sampled(groups, share, seed, f"{kind} {level}"), sum(map(len, groups.values()))
    return Level(label=level if len(played) == count else f"{level}: {len(played)} of {count}", starts=tuple(played))


def sampled(groups: Mapping[str, Sequence[Task]], share: Fraction, seed: int, stratum: str) -> list[Task]:
    """A share of what is in all groups together, rounded up, with each group's part in proportion to its size.

    A larger share has all that a smaller one has.

    Args:
        groups: by name.
        share: above 0, at most 1.
        seed: of the choice.
        stratum: what the groups make up; others are drawn independently.
    """
    ranked: list[tuple[float, str, int]] = []
    for name, members in groups.items():
        rng = generator(seed, Stream.PUBLISHED_SAMPLE, stratum, name)
        offset = rng.random()
        ranked += [
            ((rank + offset) / len(members), name, int(n)) for rank, n in enumerate(rng.permutation(len(members)))
        ]
    chosen = sorted(ranked)[: ceil(share * len(ranked))]
    return [groups[name][n] for _, name, n in sorted(chosen, key=lambda each: (list(groups).index(each[1]), each[2]))]


def sample_share(text: str) -> Fraction:
    """The share that `1/10`, `0.1` or `1` stands for.

    Raises:
        ConfigError: it is no number above 0 and at most 1.
    """
    try:
        share = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(f"--sample {text[:100]}: expected a share of the suite's tasks, such as 1/10, or 1 for all")
    return share


def _caveats(env: LiberoConfig, protocol: Protocol, share: Fraction) -> list[str]:
    said = []
    if protocol == "upstream":
        said.append(
            "upstream protocol: a stored state takes the arm back from its perturbed posture, and what is said ends in "
            "the numbers of the task's file name; for comparison with published figures"
        )
    else:
        said.append(
            "corrected protocol: the arm begins in its perturbed posture and the instruction is the task's own; not "
            "comparable with published figures"
        )
    said.append("light, background and the new things of layout are left out: their files are in no package")
    said.append("one start state a task: every perturbed episode of a task is paired with the same unperturbed one")
    if share < 1:
        said.append(f"a sample of {share} of the tasks, by axis, level and base task")
    if env.image_size != 256:
        said.append(
            f"frames of {env.image_size} pixels: noise is applied at upstream's 256 and brought back to that size"
        )
    if env.randomise.axes:
        said.append(f"trained with perturbations of {', '.join(env.randomise.axes)} (env.randomise)")
    return said
