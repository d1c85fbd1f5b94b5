"""A saved policy as a value, and the files that every family of policies writes alike."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reachrl.errors import CheckpointError, ConfigError
from reachrl.functional.action_stats import ActionStats
from reachrl.policies.storage.weights import read_json, write_json
from reachrl.policies.trained_on import TrainedOn
from reachrl.run.atomic import replace_folder_atomic
from reachrl.run.manifest import seal
from reachrl.run.stored_weights import check_finite

CONFIG_FILE = "config.json"
STATS_FILE = "dataset_statistics.json"
TOKENIZER_FILE = "tokenizer.json"
OUR_STATS = "reachrl"  # the name of the one set of action statistics that we write
Config = TypeVar("Config")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPolicy(Generic[Config]):
    """What a folder says of a policy, and where its weights lie: enough to build the policy and then fill it.

    Whole weights lie in `folder` itself; of adapters, in `whole`, the folder of their base.
    """

    folder: Path  # on this machine
    config: Config  # that the weights were trained with; its `checkpoint` is the name that was given
    whole: Path
    beside: tuple[Path, ...] = ()  # of adapters: the folders of what belongs to them
    is_adapter: bool  # whether `folder` holds adapters on the weights in `whole`
    ours: bool  # whether ReachRL wrote `folder`
    stats: ActionStats | tuple[str, ...]  # statistics; or the names to choose from, until one is chosen
    stats_name: str | None = None  # by which they are known; None: by none, or it has to be chosen
    state_stats: ActionStats | None = None  # of the robot's state, where the policy sees it
    trained_on: TrainedOn | None = None  # None: nothing is written of it
    tokenizer: Path | None  # its file
    base: Path  # the name, a folder or `owner/name`, by which adapters on these whole weights remember them
    origin: Path | None  # the foreign checkpoint that the whole weights began as; None: random ones


def write_policy(folder: Path, fill: Callable[[Path], T]) -> T:
    """Let `fill` write a policy's files aside, then seal and rename them; an earlier one in `folder` stays until then.

    Raises:
        StorageError: the disk is full or the folder cannot be written; what was there before is intact.
    """

    def fill_and_seal(aside: Path) -> T:
        result = fill(aside)
        seal(aside)
        return result

    return replace_folder_atomic(Path(folder), fill_and_seal)


def write_new(folder: Path, fill: Callable[[Path], T]) -> T:
    """`write_policy`, into a folder that must not exist.

    Raises:
        ConfigError: it exists.
        StorageError: it cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder")
    return write_policy(folder, fill)


def write_state(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors, wherever they are, into one safetensors file."""
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(weights, path, metadata={"format": "pt"})


def write_stats(folder: Path, stats: ActionStats, state: ActionStats | None = None) -> None:
    """Write the one set of action statistics of a policy of ours, and those of the robot's state."""
    parts = {
        part: {"q01": each.q01.tolist(), "q99": each.q99.tolist(), "mask": each.mask.tolist()}
        for part, each in (("action", stats), ("proprio", state))
        if each is not None
    }
    write_json(folder / STATS_FILE, {OUR_STATS: parts})


def read_stats(folder: Path, part: str = "action") -> ActionStats:
    """Read what `write_stats` wrote.

    Args:
        folder: of a policy of ours.
        part: `action`, or `proprio` for the robot's state.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        found = read_json(folder / STATS_FILE)[OUR_STATS][part]
        return ActionStats.create(found["q01"], found["q99"], found["mask"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATS_FILE} holds no {part} statistics: {error!r}") from error


def load_head(head: nn.Module, path: Path, prefix: str) -> None:
    """Read a head that was written apart from the weights, its names beginning with `prefix`.

    Raises:
        CheckpointError: the file is missing or damaged, or the head is of another size.
    """
    try:
        state = load_file(path)
        for name, tensor in state.items():
            check_finite(tensor, name, path)
        head.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} is missing, truncated or of another size: {error}") from error


def compare_architectures(stored: dict[str, Any], expected: dict[str, Any], folder: Path, ignored: set[str]) -> None:
    """Compare two architectures field by field.

    Args:
        stored: the folder's.
        expected: the configuration's.
        folder: named in the message.
        ignored: fields that may differ: of the first level, or whole paths such as `lora.base`.

    Raises:
        CheckpointError: naming every field that differs.
    """
    have, want = (
        {key: value for key, value in _flatten(all_of).items() if not {key, key.partition(".")[0]} & ignored}
        for all_of in (stored, expected)
    )
    different = [
        f"{key} (checkpoint {have.get(key)!r}, configured {want.get(key)!r})"
        for key in sorted(have.keys() | want.keys())
        if have.get(key) != want.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{folder} holds a policy of another architecture: {'; '.join(different[:12])}. "
            "Use the policy section the checkpoint was trained with"
        )


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {k: v for key, item in items for k, v in _flatten(item, f"{path}.{key}" if path else str(key)).items()}
