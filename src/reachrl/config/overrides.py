"""Overrides of a preset: `key=value` as typed, or values by key, put into a dict of sections."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from reachrl.config.values import MAX_DEPTH, as_section, flat, shown, shown_value
from reachrl.errors import ConfigError
from reachrl.registry import import_string


def parsed_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys and values, however they were given."""
    if isinstance(overrides, Mapping):
        given = {key: value for key, value in flat(dict(overrides)).items() if value != {}}
        return [(key, import_string(value) if isinstance(value, type) else value) for key, value in given.items()]
    if isinstance(overrides, str):
        raise ConfigError(f"overrides {shown_value(overrides)}: expected a list of texts, or a dict of values by key.")
    return [_pair(override) for override in overrides]


def _pair(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {shown_value(override)} is not of the form key=value, for example algorithm.lr=3e-6."
        )
    return key, _value(text)


def apply_override(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts; another `kind` drops the options of the kind that was there.

    Raises:
        ConfigError: the key has too many parts, or one of them is a value.
    """
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"override {shown(key)}: a key of {len(parents) + 1} parts; none has so many.")
    for parent in parents:
        node = as_section(data.setdefault(parent, {}))
        if node is None:
            raise ConfigError(f"override {shown_value(key)}: {parent!r} is a value, not a section.")
        data[parent] = dict(node)  # the preset's own dict stays as it is
        data = data[parent]
    if leaf == "kind" and is_another_kind(data, value):
        data.clear()
    data[leaf] = value


def is_another_kind(section: dict[str, Any], kind: Any) -> bool:
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
        raise ConfigError(f"the value {shown(text)} is too large to be read: {error}.") from error
    return found["value"] if len(found) == 1 else text  # a line break does not begin another key
