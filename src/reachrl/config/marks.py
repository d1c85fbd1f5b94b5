"""What each configuration key affects, declared where the key is: hashes, identities and refusals derive from it."""

from enum import Flag, auto
from typing import Any

from reachrl.config.base import Section


class Affects(Flag):
    """What a key decides: `tasks: Annotated[tuple[str, ...], Affects.DATA | Affects.PROTOCOL]`.

    The mark of a section's field is that of all its keys without one; a key marked `FUTURE` alone adds that to it.

    A key may change in an existing run as long as nothing of what it decides was begun; with `FUTURE`, as long as
    something of it is unfinished; with `SPEED`, always. Every change is recorded in the run folder.
    """

    SPEED = 0
    """Speed, memory, where things lie, or what is printed: no number."""
    DATA = auto()
    """The demonstrations: stage `demos`."""
    ARCHITECTURE = auto()
    """Which weights fit the policy: compared when a policy is read."""
    WARM_START = auto()
    """The policy that training begins with: stage `sft`."""
    REWARD_MODEL = auto()
    """The fit of the reward model: stage `reward`."""
    TRAINING = auto()
    """Online training: stage `train`."""
    EVALUATION = auto()
    """What the final evaluation plays, without deciding an episode's outcome: stage `eval`."""
    PROTOCOL = auto()
    """The outcome of an evaluated episode: only success rates with equal protocols compare. Stage `eval`."""
    FUTURE = auto()
    """May change while it acts: numbers differ from then on, and nothing that was computed becomes wrong."""

    EPISODE = DATA | TRAINING | PROTOCOL
    """What happens in an episode, for every policy."""
    COMPUTATION = WARM_START | REWARD_MODEL | TRAINING | EVALUATION
    """Whatever is computed with networks."""
    EVERYTHING = DATA | ARCHITECTURE | WARM_START | REWARD_MODEL | TRAINING | EVALUATION | PROTOCOL


def mark_of(section: type[Section], key: str) -> Affects | None:
    """The mark on a key of a section, or on the field of a base class that it redeclares; None without one."""
    for cls in section.__mro__:
        field = cls.model_fields.get(key) if issubclass(cls, Section) else None
        for mark in field.metadata if field else ():
            if isinstance(mark, Affects):
                return mark
    return None


def marks(config: Section, default: Affects = Affects.EVERYTHING) -> dict[str, Affects]:
    """What every key of a configuration affects, by dotted name.

    Args:
        config: a whole configuration, or a section.
        default: of keys without a mark: a plug-in's, say. Inside a section, it is the mark of the section's field.
    """
    found: dict[str, Affects] = {}
    for name in type(config).model_fields:
        value, mark = getattr(config, name), mark_of(type(config), name)
        if mark is None:
            mark = default
        elif mark is Affects.FUTURE:
            mark |= default
        found[name] = mark
        if isinstance(value, Section):
            found |= {f"{name}.{key}": inner for key, inner in marks(value, mark).items()}
    return found


def affecting(config: Section, kinds: Affects, *, fixed: bool = True) -> dict[str, Any]:
    """The keys that affect any of `kinds`, with their values as JSON types: what a hash is taken of.

    Args:
        config: a whole configuration, or a section.
        kinds: what must be decided.
        fixed: leave out what may change while it acts (`FUTURE`).
    """
    chosen = {key for key, mark in marks(config).items() if mark & kinds and not (fixed and mark & Affects.FUTURE)}
    return _chosen(config, config.model_dump(mode="json"), chosen, "")


def _chosen(config: Section, dumped: dict[str, Any], chosen: set[str], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in dumped.items():
        inner = getattr(config, name)
        if isinstance(inner, Section):
            if part := _chosen(inner, value, chosen, f"{prefix}{name}."):
                found[name] = part
        elif prefix + name in chosen:
            found[name] = value
    return found
