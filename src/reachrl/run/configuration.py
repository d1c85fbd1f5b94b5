"""The configuration of a run folder: written once, changed only where that is permitted, every change recorded."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reachrl.config.preset_files import refuse_earlier
from reachrl.errors import ConfigError
from reachrl.run.atomic import write_json_atomic
from reachrl.run.checkpoint import checkpoint_step, latest_checkpoint
from reachrl.run.records import AnyObject, ConfigHistory, read_record

CONFIG, HISTORY = "config.json", "config_history.json"


class _Absent:
    """The value of a key that a configuration does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose value in the run differs from the one asked for."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.old)} in the run, {_show(self.new)} asked for"


Permit = Callable[[Path, list[Change]], None]
"""Called with the run folder and what differs; raises `ConfigError` if that may not change there any more."""
IsDefault = Callable[[str], bool]
"""Whether the configuration asked for has the default at a dotted key."""


def never(_: str) -> bool:
    """An `IsDefault` for configurations whose defaults are not known."""
    return False


def refuse(path: Path, changes: list[Change]) -> None:
    """A `permit` that allows no change.

    Raises:
        ConfigError: always; lists the changes.
    """
    lines = [f"  {change}" for change in changes[:20]]
    if len(changes) > 20:
        lines.append(f"  ... and {len(changes) - 20} more")
    raise ConfigError(
        f"run {path} was started with another configuration:\n" + "\n".join(lines) + "\nUse the same configuration to "
        "resume it, or another --run for a new one."
    )


def claim(path: Path, config: dict[str, Any], permit: Permit, is_default: IsDefault = never) -> None:
    """Write `config.json` into a new run; in an existing one, change it where `permit` lets us, and record that.

    Args:
        path: the run folder.
        config: the configuration asked for.
        permit: judges the changes.
        is_default: a key that the run's configuration does not have is no change where this says so: an earlier
            version wrote it, when the option did not exist.

    Raises:
        ConfigError: something differs that may not.
        StorageError: the stored configuration is damaged.
    """
    file = path / CONFIG
    if not file.exists():
        write_json_atomic(file, config)
        return
    changes = config_changes(read_config(path), config, is_default)
    if not changes:
        return
    permit(path, changes)
    record_changes(path, changes)
    write_json_atomic(file, config)


def read_config(path: Path) -> dict[str, Any]:
    """The stored configuration of a run.

    Raises:
        ConfigError: an earlier version wrote it, with other sections.
        StorageError: it is damaged.
    """
    config = read_record(path / CONFIG, AnyObject, remedy="choose another --run")
    refuse_earlier(config, path)
    return config


def record_changes(path: Path, changes: list[Change]) -> None:
    """Add an entry to `config_history.json`: when, at which iteration, by which command, and `{key: [old, new]}`."""
    latest = latest_checkpoint(path / "checkpoints")
    entry = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "iteration": 0 if latest is None else checkpoint_step(latest),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "changes": {change.key: [_stored(change.old), _stored(change.new)] for change in changes},
    }
    entries = read_history(path)
    if entries and entries[-1]["changes"] == entry["changes"]:
        entries.pop()  # killed before the configuration itself was written
    write_json_atomic(path / HISTORY, [*entries, entry])


def read_history(path: Path) -> list[dict[str, Any]]:
    """The entries of `config_history.json`, the earliest first; none where nothing was ever changed.

    Raises:
        StorageError: the file is damaged.
    """
    file = path / HISTORY
    if not file.exists():
        return []
    remedy = "it lists the changes of the run's configuration: repair it, or delete it to go on without them"
    return read_record(file, ConfigHistory, remedy=remedy)


def config_changes(old: Any, new: Any, is_default: IsDefault = never, prefix: str = "") -> list[Change]:
    """Return the changes from one configuration to another; a key that only `new` has is none at its default."""
    if _are_tables(old) and _are_tables(new) and len(old) == len(new):
        old, new = ({str(place): table for place, table in enumerate(tables)} for tables in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new or (old is ABSENT and is_default(prefix)) else [Change(prefix, old, new)]
    found: list[Change] = []
    for key in sorted(old.keys() | new.keys()):
        inner = f"{prefix}.{key}" if prefix else key
        found += config_changes(old.get(key, ABSENT), new.get(key, ABSENT), is_default, inner)
    return found


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)


def _stored(value: Any) -> Any:
    return None if value is ABSENT else value
