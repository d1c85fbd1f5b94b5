"""From a preset and `key=value` overrides to one validated configuration, with errors that name the key."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reachrl.config.algorithm import AlgorithmSection
from reachrl.config.backend import BackendSection
from reachrl.config.base import Section
from reachrl.config.env import EnvSection
from reachrl.config.marks import Affects, affecting
from reachrl.config.named_code import check_names, trust_names
from reachrl.config.overrides import apply_override, is_another_kind, parsed_overrides
from reachrl.config.preset_files import PRESETS, file_and_base, merged_layers
from reachrl.config.problems import problems_of_section
from reachrl.config.reward_model import RewardModelSection
from reachrl.config.train import KIND_SECTIONS, TrainConfig
from reachrl.config.values import MAX_DEPTH, as_section, depth, flat, shown, shown_value
from reachrl.errors import ConfigError
from reachrl.registry import section_class

# The loop reads these sections' common options, whatever the kind.
_SECTION_BASES: dict[str, type[Section]] = {
    "env": EnvSection,
    "reward_model": RewardModelSection,
    "algorithm": AlgorithmSection,
    "backend": BackendSection,
}


@dataclass(frozen=True, slots=True)
class Deviation:
    """One key in which a preset differs from the paper's, and why."""

    key: str
    paper_value: Any
    value: Any
    reason: str


def list_presets() -> dict[str, str]:
    """Built-in presets by name with their one-line descriptions."""
    names = sorted(item.name.removesuffix(".toml") for item in PRESETS.iterdir() if item.name.endswith(".toml"))
    return {name: merged_layers(name)[0].get("description", "") for name in names}


def load_config(preset: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> TrainConfig:
    """Resolve a preset (built-in name, TOML file, or a run's `config.json`) and overrides.

    Args:
        preset: its name or its file.
        overrides: texts as on the command line, `["seed=2", "env.num_envs=4"]`; or values by key,
            `{"env.kind": MyEnv, "env": {"num_envs": 4}}`, where a plug-in's class stands for its import string.

    A TOML file and the overrides are the user's word and may name plug-ins; a JSON file is stored data and
    may not, unless they name the same.

    Raises:
        ConfigError: unknown preset, unknown key, wrong type; the message names the key and what was expected.
    """
    data, _ = merged_layers(preset)
    typed: dict[str, Any] = {}
    if depth(data) > MAX_DEPTH:
        raise ConfigError(f"{shown(preset)}: tables or lists are nested deeper than {MAX_DEPTH} levels.")
    # Kinds first: the options of a section are those of its kind, whatever order they were typed in.
    for key, value in sorted(parsed_overrides(overrides), key=lambda pair: not pair[0].endswith(".kind")):
        apply_override(data, key, value)
        apply_override(typed, key, value)
    trust_names(typed)
    check_names(data, where=preset)
    return validate(data, where=preset)


def reset_by_kind(preset: str, overrides: Sequence[str] | Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What a change of `kind` has reset, in words: options that the preset sets otherwise, or a file's base.

    Args:
        preset: its name or its file.
        overrides: as for `load_config`.
        config: what `load_config` made of both.
    """
    typed = dict(parsed_overrides(overrides))
    notes = _reset(merged_layers(preset)[0], typed, Path(preset).stem, config)
    if (layers := file_and_base(preset)) is not None:
        own, below, base = layers
        notes = _reset(below, flat(own) | typed, base, config, {key for key in typed if key.endswith(".kind")}) + notes
    return notes


def _reset(
    below: dict[str, Any],
    typed: dict[str, Any],
    name: str,
    config: TrainConfig,
    skipped: AbstractSet[str] = frozenset(),
) -> list[str]:
    """A line for each kind in `typed`, but for the `skipped`, that resets options of the layer `below`."""
    notes: list[str] = []
    for key in KIND_SECTIONS:
        before, kind = as_section(below.get(key)), typed.get(f"{key}.kind")
        if not before or f"{key}.kind" in skipped or not is_another_kind(before, kind):
            continue
        now = config_dict(getattr(config, key))
        reset = [
            f"{key}.{option} {shown_value(before[option])} -> {shown_value(now[option])}"
            for option in sorted((before.keys() & now.keys()) - {"kind"})
            if f"{key}.{option}" not in typed and before[option] != now[option]
        ]
        if reset:
            notes.append(
                f"{key}.kind={kind} begins with its own defaults, not with what {name} sets: {', '.join(reset)}"
            )
    return notes


def validate(data: dict[str, Any], *, where: str) -> TrainConfig:
    """Validate one merged dict; sections chosen by `kind` are validated by the class that the kind names.

    Raises:
        ConfigError: every problem found, each with its key.
    """
    data, problems, config = dict(data), list[str](), None
    for key, group in KIND_SECTIONS.items():
        section = as_section(data.get(key, {}))
        if section is None:
            raise ConfigError(f"{where}: {key!r} is a section; set its options, for example {key}.kind=...")
        default = TrainConfig.model_fields[key].default
        cls = section_class(group, str(section.get("kind", default.kind)))
        if not issubclass(cls, _SECTION_BASES.get(key, Section)):
            needed = _SECTION_BASES[key].__name__
            raise ConfigError(
                f"{where}: {key}.kind={shown_value(section.get('kind'))}: its `Config` must be a subclass of {needed}."
            )
        try:
            data[key] = cls.model_validate(section)
        except ValidationError as error:
            problems += problems_of_section(error, cls, prefix=key)
            data.pop(key, None)
    try:
        config = TrainConfig.model_validate(data)
    except ValidationError as error:
        # Where a section is refused, checks across sections would judge the default in its place.
        problems += problems_of_section(error, TrainConfig, prefix="", across=not problems)
    if problems or config is None:
        raise ConfigError(f"{where}: " + "\n  ".join(["the configuration is not valid:", *problems]))
    return config


def config_dict(config: Section) -> dict[str, Any]:
    """The resolved configuration as JSON-ready values."""
    return config.model_dump(mode="json")


def is_default(config: Section, key: str) -> bool:
    """Whether a configuration has, at a dotted key such as `env.num_envs` or `policy.towers.0`, what it has unasked."""
    name, _, inner = key.partition(".")
    field = type(config).model_fields.get(name)
    if field is None:
        return False
    value: Any = getattr(config, name)
    if not inner:
        return not field.is_required() and value == field.get_default(call_default_factory=True)
    if isinstance(value, tuple):  # sections by their place
        place, _, inner = inner.partition(".")
        sections: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        value = sections[int(place)] if place.isdigit() and int(place) < len(sections) else None
    return bool(inner) and isinstance(value, Section) and is_default(value, inner)


def config_hash(config: Section) -> str:
    """Twelve hex digits that change with every key but those marked `Affects.SPEED`, which decide no number."""
    decisive = affecting(config, Affects.EVERYTHING, fixed=False)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def explain(preset: str) -> list[Deviation]:
    """Where `preset` departs from the `paper` preset, with the reason its file gives for each key."""
    paper, _ = merged_layers("paper")
    _, reasons = merged_layers(preset)
    ours, theirs = flat(config_dict(load_config(preset))), flat(config_dict(validate(paper, where="paper")))
    skipped = {"description"}
    return [
        Deviation(key, theirs.get(key), value, _reason(reasons, key))
        for key, value in sorted(ours.items())
        if key not in skipped and theirs.get(key) != value
    ]


def _reason(reasons: dict[str, str], key: str) -> str:
    """The reason given for `key`, or for the nearest section around it."""
    while key not in reasons and "." in key:
        key = key.rpartition(".")[0]
    return reasons.get(key, "")
