"""Sets of action statistics by dataset, as the official layout keeps them."""

from pathlib import Path
from typing import Any

from reachrl.errors import CheckpointError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.lora.files import base_of, beside, is_adapter
from reachrl.policies.storage.saved import CONFIG_FILE, STATS_FILE
from reachrl.policies.storage.weights import read_json


def norm_stats(folder: Path) -> dict[str, Any]:
    """All action statistics of a folder by dataset: its base's or its configuration's, and those beside it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if is_adapter(folder) and not (folder / CONFIG_FILE).is_file():  # of another tool
        return norm_stats(base_of(folder)) | _beside(folder)
    return _named(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE).get("norm_stats")) | _beside(folder)


def _beside(folder: Path) -> dict[str, Any]:
    """Fine-tuned checkpoints carry their own statistics beside the configuration."""
    path = beside(folder, STATS_FILE)
    return {} if path is None else _named(path, read_json(path))


def _named(path: Path, stats: Any) -> dict[str, Any]:
    if not isinstance(stats, dict | None):
        raise CheckpointError(f"{path} holds action statistics as a {type(stats).__name__}, expected sets by name")
    return stats or {}


def dataset_of(folder: Path, dataset: str | None) -> str | None:
    """The name of the action statistics that hold; None where no name was given and none goes without saying.

    Args:
        folder: an official checkpoint.
        dataset: the name that was given. Without one it is the only set beside the configuration, which a fine-tuned
            checkpoint acts by whatever its configuration inherited, or the only set at all.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if dataset is not None:
        return dataset
    return next((next(iter(sets)) for sets in (_beside(folder), norm_stats(folder)) if len(sets) == 1), None)


def official_stats(
    folder: Path, dataset: str, *, part: str = "action", low: str = "q01", high: str = "q99"
) -> ActionStats:
    """The action statistics of one dataset.

    Args:
        folder: with statistics, its own or its base's.
        dataset: the name of the set.
        part: `action`, or `proprio` for those of the robot's state.
        low: what is mapped to -1.
        high: what is mapped to 1.

    Raises:
        CheckpointError: `dataset` is not among them, or its entry is damaged.
    """
    stats = norm_stats(folder)
    if dataset not in stats:
        raise CheckpointError(f"{folder} has no action statistics named {dataset!r}; it has {sorted(stats)}")
    try:
        found = stats[dataset][part]
        return ActionStats.create(found[low], found[high], found.get("mask", [True] * len(found[low])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the action statistics {dataset!r} of {folder} are damaged ({error!r}); expected `{part}` with `{low}` "
            f"and `{high}`, finite numbers, one for each dimension"
        ) from error
