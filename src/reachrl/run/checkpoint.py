"""Checkpoints that are complete or absent, with a digest of every file."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from reachrl.errors import CheckpointError
from reachrl.run.atomic import recover_tree, replace_folder_atomic, write_json_atomic

MANIFEST = "manifest.json"
_STEP = re.compile(r"^step_(\d{6,})$")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, **info: object) -> None:
    """List every file of `folder` with its size and SHA-256 in `manifest.json`.

    Args:
        folder: A folder whose files are all written.
        info: Further entries of the manifest, such as the step.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    write_json_atomic(folder / MANIFEST, {**info, "files": files})


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


def save_checkpoint(folder: Path, step: int, fill: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Write `folder/step_NNNNNN` in one piece and drop the oldest ones beyond `keep`.

    Args:
        folder: Where the run's checkpoints live.
        step: Iteration or optimiser step the checkpoint belongs to.
        fill: Writes the files into the folder it is given.
        keep: How many checkpoints stay, this one included; at least 1.

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
        write_manifest(aside, step=step)

    recover_tree(Path(folder))
    replace_folder_atomic(path, fill_and_seal)
    # Only now that the new one has its final name may an old one go; the new one never does.
    others = [other for other in list_checkpoints(Path(folder)) if other != path]
    for other in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(other)
    return path


def verify_checkpoint(path: Path) -> dict:
    """Check every file against the manifest.

    Args:
        path: A checkpoint folder, or any folder sealed by `write_manifest`.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The folder or a file is missing, truncated or altered; names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist; expected a folder holding {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_broken(path, path / MANIFEST, f"cannot be read ({error})")) from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(_broken(path, file, "is missing"))
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(_broken(path, file, f"has {size} bytes where {expected['bytes']} were written"))
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(_broken(path, file, "was altered after it was written (SHA-256 differs)"))
    return manifest


def _broken(checkpoint: Path, file: Path, what: str) -> str:
    older = [other.name for other in list_checkpoints(checkpoint.parent) if other != checkpoint]
    remedy = f"delete {checkpoint} to resume from {older[-1]}" if older else "copy it again, or start over"
    return f"checkpoint file {file} {what}; {remedy}"
