"""From a preset and `key=value` overrides to one validated configuration, with errors that name the key."""

import difflib
import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from reachrl.config.algorithm import AlgorithmSection
from reachrl.config.backend import BackendSection
from reachrl.config.base import Section
from reachrl.config.env import EnvSection
from reachrl.config.evaluation import with_temperatures
from reachrl.config.marks import Affects, affecting
from reachrl.config.named_code import check_names, trust_names
from reachrl.config.reward_model import RewardModelSection
from reachrl.config.train import KIND_SECTIONS, TrainConfig
from reachrl.errors import ConfigError
from reachrl.registry import import_string, section_class

# The loop reads these sections' common options, whatever the kind.
_SECTION_BASES: dict[str, type[Section]] = {
    "env": EnvSection,
    "reward_model": RewardModelSection,
    "algorithm": AlgorithmSection,
    "backend": BackendSection,
}
# Former names of sections and keys, before releases: where each is now.
_MOVED = {
    "num_steps": "rollout.num_steps",
    "ppo.temperature": "rollout.temperature",
    "ppo.engine_kl_alarm": "rollout.engine_kl_alarm",
    "ppo": "algorithm",
}
PRESETS = files("reachrl.config") / "presets"
MAX_DEPTH = 20  # of tables in tables, and of presets that build on each other
MAX_PROBLEMS = 20
MAX_SHOWN = 200  # characters of a value in a message


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
    return {name: _layers(name)[0].get("description", "") for name in names}


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
    data, _ = _layers(preset)
    typed: dict[str, Any] = {}
    if _depth(data) > MAX_DEPTH:
        raise ConfigError(f"{_shown(preset)}: tables or lists are nested deeper than {MAX_DEPTH} levels.")
    # Kinds first: the options of a section are those of its kind, whatever order they were typed in.
    for key, value in sorted(_overrides(overrides), key=lambda pair: not pair[0].endswith(".kind")):
        _apply(data, key, value)
        _apply(typed, key, value)
    trust_names(typed)
    check_names(data, where=preset)
    return validate(data, where=preset)


def validate(data: dict[str, Any], *, where: str) -> TrainConfig:
    """Validate one merged dict; sections chosen by `kind` are validated by the class that the kind names.

    Raises:
        ConfigError: every problem found, each with its key.
    """
    data, problems, config = dict(data), list[str](), None
    for key, group in KIND_SECTIONS.items():
        section = _as_section(data.get(key, {}))
        if section is None:
            raise ConfigError(f"{where}: {key!r} is a section; set its options, for example {key}.kind=...")
        default = TrainConfig.model_fields[key].default
        cls = section_class(group, str(section.get("kind", default.kind)))
        if not issubclass(cls, _SECTION_BASES.get(key, Section)):
            needed = _SECTION_BASES[key].__name__
            raise ConfigError(
                f"{where}: {key}.kind={_repr(section.get('kind'))}: its `Config` must be a subclass of {needed}."
            )
        try:
            data[key] = cls.model_validate(section)
        except ValidationError as error:
            problems += _problems(error, cls, prefix=key)
            data.pop(key, None)
    try:
        config = TrainConfig.model_validate(data)
    except ValidationError as error:
        problems += _problems(error, TrainConfig, prefix="")
    if problems or config is None:
        raise ConfigError(f"{where}: " + "\n  ".join(["the configuration is not valid:", *problems]))
    return config


def config_dict(config: Section) -> dict[str, Any]:
    """The resolved configuration as JSON-ready values."""
    return config.model_dump(mode="json")


def config_hash(config: Section) -> str:
    """Twelve hex digits that change with every key but those marked `Affects.SPEED`, which decide no number."""
    decisive = affecting(config, Affects.EVERYTHING, fixed=False)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def explain(preset: str) -> list[Deviation]:
    """Where `preset` departs from the `paper` preset, with the reason its file gives for each key."""
    paper, _ = _layers("paper")
    _, reasons = _layers(preset)
    ours, theirs = _flat(config_dict(load_config(preset))), _flat(config_dict(validate(paper, where="paper")))
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


def _layers(preset: str, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The preset's merged dict (its `base` first) and the reasons given for its keys.

    Raises:
        ConfigError: a preset that `_read` refuses, presets in a circle, or a wrong `base` or `reasons`.
    """
    chain = " -> ".join(map(_shown, [*above, preset]))
    if preset in above or any(_same_file(preset, other) for other in above):
        raise ConfigError(f"presets build on each other in a circle: {chain}.")
    if len(above) >= MAX_DEPTH:
        raise ConfigError(f"more than {MAX_DEPTH} presets build on each other: {_shown(chain)}.")
    data = _read(preset)
    base, reasons = data.pop("base", None), _as_section(data.pop("reasons", {}))
    if reasons is None or not all(isinstance(reason, str) for reason in reasons.values()):
        raise ConfigError(
            f'{preset}: reasons is a table of keys and sentences, such as "algorithm.lr" = "why it differs".'
        )
    if not any(file.endswith(".json") for file in (*above, preset)):
        trust_names(data)
    if base is None:
        return data, reasons
    if not isinstance(base, str):
        raise ConfigError(f"{preset}: base = {_repr(base)}: expected the name or the file of a preset, in quotes.")
    if base.endswith(".toml") and preset.endswith(".toml"):
        base = str(Path(preset).parent / base)  # beside the file that names it
    below, below_reasons = _layers(base, (*above, preset))
    return _merge(below, data), below_reasons | reasons


def _read(preset: str) -> dict[str, Any]:
    """What the file of one preset holds.

    Raises:
        ConfigError: no such preset, or its file cannot be read or holds something else.
    """
    own = preset.endswith((".toml", ".json"))
    file = Path(preset) if own else PRESETS / f"{preset}.toml"
    try:
        found = file.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"preset {_shown(preset)} cannot be looked for: {reason}.") from error
    if own and not found:
        raise ConfigError(f"preset file {_shown(preset)} does not exist.")
    if not found:
        names = [entry.name.removesuffix(".toml") for entry in PRESETS.iterdir() if entry.name.endswith(".toml")]
        raise ConfigError(
            f"unknown preset {_repr(preset)}{_close(preset, names)}. Built-in presets: {', '.join(sorted(names))}; "
            "or give the path of a .toml file, or of a run's config.json."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark
        data = json.loads(text, object_pairs_hook=_unique) if preset.endswith(".json") else tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{preset}: tables or lists are nested deeper than {MAX_DEPTH} levels.") from error
    except OSError as error:
        raise ConfigError(f"preset file {preset} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of both languages, and of bytes that are no UTF-8
        raise ConfigError(f"{preset}: not valid {file.name.rpartition('.')[2].upper()}: {error}") from error
    section = _as_section(data)
    if section is None:
        raise ConfigError(f"{preset}: expected an object such as a run's config.json, found {type(data).__name__}.")
    if preset.endswith(".json"):
        refuse_earlier(section, Path(preset).parent)
    if (evaluation := _as_section(section.get("eval"))) is not None:
        try:
            section["eval"] = with_temperatures(evaluation)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{preset}: eval: {error}.") from error
    return section


def refuse_earlier(config: dict[str, Any], run: Path) -> None:
    """Refuse the stored configuration of a run that a version with other sections wrote.

    Raises:
        ConfigError: names the version that wrote the run.
    """
    if "ppo" in config and "algorithm" not in config:
        section, instead = "ppo", "has `algorithm` and `rollout` instead"
    elif "vllm" in (_as_section(config.get("policy")) or {}):
        section, instead = "policy.vllm", "decodes without vLLM"
    else:
        return
    writer = "an earlier version of ReachRL"
    try:
        facts = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
        commit = facts["commit"]
        writer = f"ReachRL {facts['packages']['reachrl']}" + (f" (commit {commit[:12]})" if commit else "")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a run without provenance is refused all the same
    raise ConfigError(
        f"run {run} was written by {writer}, whose configuration has a section `{section}`; this version "
        f"{instead}. Use the version that wrote it, or begin another run with this one."
    )


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    if _another_kind(below, above.get("kind")):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        lower, upper = _as_section(merged.get(key)), _as_section(value)
        merged[key] = value if lower is None or upper is None else _merge(lower, upper)
    return merged


def _as_section(value: Any) -> dict[str, Any] | None:
    """`value` if it is a section, that is a TOML table."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _overrides(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys and values, however they were given."""
    if isinstance(overrides, Mapping):
        given = _flat(dict(overrides))
        return [(key, import_string(value) if isinstance(value, type) else value) for key, value in given.items()]
    if isinstance(overrides, str):
        raise ConfigError(f"overrides {_repr(overrides)}: expected a list of texts, or a dict of values by key.")
    return [_pair(override) for override in overrides]


def _pair(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {_repr(override)} is not of the form key=value, for example algorithm.lr=3e-6.")
    return key, _value(text)


def _apply(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"override {_shown(key)}: a key of {len(parents) + 1} parts; none has so many.")
    for parent in parents:
        node = _as_section(data.setdefault(parent, {}))
        if node is None:
            raise ConfigError(f"override {_repr(key)}: {parent!r} is a value, not a section.")
        data[parent] = dict(node)  # the preset's own dict stays as it is
        data = data[parent]
    if leaf == "kind" and _another_kind(data, value):
        data.clear()
    data[leaf] = value


def _another_kind(section: dict[str, Any], kind: Any) -> bool:
    """Whether `kind` replaces the one that a lower layer chose, whose options then mean nothing."""
    return kind is not None and section.get("kind", kind) != kind


def _value(text: str) -> Any:
    """A TOML value, `none`, or the text itself (so that names need no quotes)."""
    if text.lower() in ("none", "null"):
        return None
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise ConfigError(f"the value {_shown(text)} is too large to be read: {error}.") from error
    return found["value"] if len(found) == 1 else text  # a line break does not begin another key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a key may stand once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {_shown(twice)} stands twice in an object")
    return found


def _depth(value: Any) -> int:
    """Levels of tables and lists, without recursion."""
    depth, level = 0, [value]
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in cast("list[Any]", list(outer.values()) if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


def _same_file(one: str, other: str) -> bool:
    """Whether two presets are one file by different paths."""
    if not (one.endswith((".toml", ".json")) and other.endswith((".toml", ".json"))):
        return False
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def _shown(text: str) -> str:
    """A text in a message, shortened."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _repr(value: Any) -> str:
    """A value in a message, shortened."""
    try:
        return _shown(repr(value))
    except ValueError:  # thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _problems(error: ValidationError, cls: type[Section], prefix: str) -> list[str]:
    lines: list[str] = []
    found = error.errors(include_url=False)
    for item in found[:MAX_PROBLEMS]:
        path = [str(part) for part in item["loc"]]
        key = ".".join(part for part in [prefix, *path] if part)
        if item["type"] == "extra_forbidden":
            known = _known(cls, path[:-1])
            inner = _as_section(item.get("input")) if key in _MOVED else None
            if inner:
                lines += [
                    f"unknown key {_repr(f'{key}.{each}')} (did you mean {_moved(f'{key}.{each}')!r}?)."
                    for each in inner
                ]
                continue
            hint = f" (did you mean {_MOVED[key]!r}?)" if key in _MOVED else _close(path[-1], known)
            lines.append(f"unknown key {_repr(key)}{hint}. Known here: {', '.join(known)}.")
        else:
            said = item["msg"].removeprefix("Value error, ")
            # A check across options fails for the whole section, which is too long to print.
            whole = isinstance(item.get("input"), dict | Section)
            lines.append(f"{key or 'options'}: {said}." if whole else f"{key} = {_repr(item.get('input'))}: {said}.")
    if len(found) > MAX_PROBLEMS:
        lines.append(f"... and {len(found) - MAX_PROBLEMS} more in {prefix or 'the options'}.")
    return lines


def _moved(key: str) -> str:
    """The present name of a key that has moved."""
    section, _, leaf = key.partition(".")
    return _MOVED.get(key, f"{_MOVED[section]}.{leaf}")


def _known(cls: type[Section], path: list[str]) -> list[str]:
    fields = cls.model_fields
    for part in path:
        annotation = fields[part].annotation if part in fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return []
        fields = annotation.model_fields
    return sorted(fields)


def _close(word: str, known: list[str]) -> str:
    match = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        section = _as_section(value)
        flat |= {prefix + key: value} if section is None else _flat(section, f"{prefix}{key}.")
    return flat
