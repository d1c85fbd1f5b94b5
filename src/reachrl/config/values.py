"""Values of configuration files: sections, dotted keys, and how a message shows them."""

import difflib
from typing import Any, cast

MAX_DEPTH = 20  # of tables in tables, and of presets that build on each other
MAX_SHOWN = 200  # characters of a value in a message


def as_section(value: Any) -> dict[str, Any] | None:
    """`value` if it is a section, that is a TOML table."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dict of sections as values by dotted key; an empty one is a value."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        section = as_section(value)
        found |= flat(section, f"{prefix}{key}.") if section else {prefix + key: value}
    return found


def depth(value: Any) -> int:
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


def shown(text: str) -> str:
    """A text in a message, shortened."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def shown_value(value: Any) -> str:
    """A value in a message, shortened."""
    try:
        return shown(repr(value))
    except ValueError:  # thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def suggestion(word: str, known: list[str]) -> str:
    """The end of a message: the known word that is nearest, if one is near."""
    match = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
