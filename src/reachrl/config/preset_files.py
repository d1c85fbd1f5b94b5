"""The files of presets: read, merged onto those they build on, and refused where an earlier version wrote them."""

import json
import tomllib
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from reachrl.config.evaluation import with_temperatures
from reachrl.config.named_code import trust_names
from reachrl.config.overrides import is_another_kind
from reachrl.config.values import MAX_DEPTH, as_section, shown, shown_value, suggestion
from reachrl.errors import ConfigError

PRESETS = files("reachrl.config") / "presets"


def merged_layers(preset: str, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The preset's merged dict (its `base` first) and the reasons given for its keys.

    Raises:
        ConfigError: a preset that `_read` refuses, presets in a circle, or a wrong `base` or `reasons`.
    """
    chain = " -> ".join(map(shown, [*above, preset]))
    if preset in above or any(_same_file(preset, other) for other in above):
        raise ConfigError(f"presets build on each other in a circle: {chain}.")
    if len(above) >= MAX_DEPTH:
        raise ConfigError(f"more than {MAX_DEPTH} presets build on each other: {shown(chain)}.")
    data = _read(preset)
    base, reasons = data.pop("base", None), as_section(data.pop("reasons", {}))
    if reasons is None or not all(isinstance(reason, str) for reason in reasons.values()):
        raise ConfigError(
            f'{preset}: reasons is a table of keys and sentences, such as "algorithm.lr" = "why it differs".'
        )
    if not any(file.endswith(".json") for file in (*above, preset)):
        trust_names(data)
    if base is None:
        return data, reasons
    if not isinstance(base, str):
        raise ConfigError(
            f"{preset}: base = {shown_value(base)}: expected the name or the file of a preset, in quotes."
        )
    below, below_reasons = merged_layers(_beside(preset, base), (*above, preset))
    return _merge(below, data), below_reasons | reasons


def file_and_base(preset: str) -> tuple[dict[str, Any], dict[str, Any], str] | None:
    """Of a TOML file that names a base: what the file itself says, what its base says, and the base's name."""
    if not preset.endswith(".toml"):
        return None
    data = _read(preset)
    base = data.pop("base", None)
    if not isinstance(base, str):
        return None
    return data, merged_layers(_beside(preset, base))[0], Path(base).stem


def _beside(preset: str, base: str) -> str:
    """The base that a preset names: a file lies beside the file that names it."""
    return str(Path(preset).parent / base) if base.endswith(".toml") and preset.endswith(".toml") else base


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
        raise ConfigError(f"preset {shown(preset)} cannot be looked for: {reason}.") from error
    if own and not found:
        raise ConfigError(f"preset file {shown(preset)} does not exist.")
    if not found:
        names = [entry.name.removesuffix(".toml") for entry in PRESETS.iterdir() if entry.name.endswith(".toml")]
        raise ConfigError(
            f"unknown preset {shown_value(preset)}{suggestion(preset, names)}. Built-in presets: "
            f"{', '.join(sorted(names))}; or give the path of a .toml file, or of a run's config.json."
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
    section = as_section(data)
    if section is None:
        raise ConfigError(f"{preset}: expected an object such as a run's config.json, found {type(data).__name__}.")
    if preset.endswith(".json"):
        refuse_earlier(section, Path(preset).parent)
    if (evaluation := as_section(section.get("eval"))) is not None:
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
    elif "vllm" in (as_section(config.get("policy")) or {}):
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
    if is_another_kind(below, above.get("kind")):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        lower, upper = as_section(merged.get(key)), as_section(value)
        merged[key] = value if lower is None or upper is None else _merge(lower, upper)
    return merged


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a key may stand once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return found


def _same_file(one: str, other: str) -> bool:
    """Whether two presets are one file by different paths."""
    if not (one.endswith((".toml", ".json")) and other.endswith((".toml", ".json"))):
        return False
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False
