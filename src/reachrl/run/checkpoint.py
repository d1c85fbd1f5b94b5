"""Checkpoints that are complete or absent, with a digest of every file."""

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from reachrl.errors import CheckpointError
from reachrl.run.atomic import recover_tree, replace_folder_atomic
from reachrl.run.manifest import MANIFEST, seal, verify

_STEP = re.compile(r"^step_(\d{6,})$")


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    match = _STEP.match(Path(path).name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder; expected a name such as step_000120")
    return int(match.group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None where there is none.

    The name exists only after every file was flushed and the folder renamed. Call `verify_checkpoint`
    before reading it.
    """
    found = list_checkpoints(Path(folder))
    return found[-1] if found else None


def save_checkpoint(
    folder: Path, step: int, fill: Callable[[Path], None], *, keep: int = 2, protected: Collection[int] = ()
) -> Path:
    """Write `folder/step_NNNNNN` in one piece and drop the oldest ones beyond `keep`.

    Args:
        folder: Where the run's checkpoints live.
        step: Iteration or optimiser step the checkpoint belongs to.
        fill: Writes the files into the folder it is given.
        keep: How many of the newest checkpoints stay, this one included; at least 1.
        protected: Steps whose checkpoints stay as well.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: The disk refused a write; earlier checkpoints are intact.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    path = Path(folder) / f"step_{step:06d}"

    def fill_and_seal(aside: Path) -> None:
        fill(aside)
        seal(aside, step=step)

    recover_tree(Path(folder))
    replace_folder_atomic(path, fill_and_seal)
    # Only now that the new one has its final name may an old one go; the new one never does.
    others = [other for other in list_checkpoints(Path(folder)) if other != path]
    for other in others[: max(0, len(others) - (keep - 1))]:
        if checkpoint_step(other) not in protected:
            shutil.rmtree(other)
    return path


def verify_checkpoint(path: Path, *, nested: bool = True) -> dict:
    """Check every file against the manifest.

    Args:
        path: A checkpoint folder.
        nested: Also check folders inside that have a manifest of their own, such as the policy's; False where their
            reader does it anyway.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The folder or a file is missing, truncated or altered; names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist; expected a folder holding {MANIFEST}")
    older = [other.name for other in list_checkpoints(path.parent) if other != path]
    remedy = f"delete {path} to resume from {older[-1]}" if older else "copy the checkpoint again, or start over"
    return verify(path, remedy=remedy, nested=nested)


def read_state(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); resume from another checkpoint.") from error
