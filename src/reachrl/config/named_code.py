"""Which code a configuration names, and whose word that is: the user's, or only a stored file's."""

from collections.abc import Iterator
from typing import Any, cast

from reachrl import registry
from reachrl.config.train import KIND_SECTIONS

# Import strings besides kinds. What `transformers` itself brings needs nobody's word.
_CLASSES = ("model_class", "processor_class")
LIBRARY = "transformers:"


def names(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a configuration names that is neither built in nor installed: dotted key and import string.

    Args:
        data: the configuration before it is validated, or some of it.
    """
    for key, group in KIND_SECTIONS.items():
        kind = str(_section(data, key).get("kind", ""))
        if ":" in kind and kind not in registry.kinds(group):
            yield f"{key}.kind", kind
    for option in _CLASSES:
        target = str(_section(data, "reward_model").get(option, LIBRARY))
        if not target.startswith(LIBRARY):
            yield f"reward_model.{option}", target


def trust_names(data: dict[str, Any]) -> None:
    """Note what the user has typed, on the command line or in a preset."""
    for _, name in names(data):
        registry.trust(name)


def check_names(data: dict[str, Any], *, where: str) -> None:
    """Refuse what a stored configuration names and the user does not.

    Raises:
        ConfigError: names the first key, and all that have to be typed; nothing was imported.
    """
    unnamed = [(key, name) for key, name in names(data) if not registry.is_trusted(name)]
    if unnamed:
        key, name = unnamed[0]
        typed = " ".join(f"{key}={name}" for key, name in unnamed)
        raise registry.untrusted(name, where=f"{where}: {key}", remedy=f"add  {typed}  to the command")


def _section(data: dict[str, Any], key: str) -> dict[str, Any]:
    section = data.get(key)
    return cast("dict[str, Any]", section) if isinstance(section, dict) else {}
