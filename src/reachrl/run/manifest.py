"""Manifest of a folder's files with their SHA-256, written last; a sealed folder is verified when it is read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from reachrl.errors import CheckpointError
from reachrl.run.atomic import write_json_atomic

MANIFEST = "manifest.json"
FORMAT = "reachrl-manifest-1"
# By file name, keys that a user may change: messages tell them to write the place of a base that has moved.
_OPEN_KEYS = {"adapter_config.json": ("base_model_name_or_path",)}


def seal(folder: Path, **info: object) -> None:
    """List every file of `folder` with its size and SHA-256 in `manifest.json`.

    A folder inside that has a manifest of its own is listed by that alone: its files are not read again.

    Args:
        folder: a folder whose files are all written.
        info: further entries of the manifest, such as the step.
    """
    sealed = {path.parent for path in folder.rglob(MANIFEST) if path.parent != folder and _is_ours(path)}
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        inside = any(place == path.parent or place in path.parents for place in sealed)
        if path.is_file() and path != folder / MANIFEST and (not inside or _stands_for(path, sealed)):
            files[path.relative_to(folder).as_posix()] = _entry(path)
    content = json.loads(json.dumps({"format": FORMAT, **info, "files": files}))
    write_json_atomic(folder / MANIFEST, {**content, "sha256": _digest(content)})


def _stands_for(path: Path, sealed: set[Path]) -> bool:
    """Whether `path` is the manifest of an outermost sealed folder."""
    return path.name == MANIFEST and path.parent in sealed and not sealed.intersection(path.parent.parents)


def is_sealed(folder: Path) -> bool:
    """Whether `folder` has a manifest of ours; others use the name too."""
    return _is_ours(Path(folder) / MANIFEST)


def verify(folder: Path, *, remedy: str, nested: bool = True) -> dict[str, Any]:
    """Compare every listed file with the manifest. Files that are not listed, such as a README, are ignored.

    Args:
        folder: sealed.
        remedy: what to do, for the message.
        nested: also verify folders inside with a manifest of their own; False where their reader does it anyway.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
    """
    manifest = _read(folder, remedy)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {remedy}")
        size = file.stat().st_size
        if "bytes" in expected and size != expected["bytes"]:
            how = "is truncated: it" if size < expected["bytes"] else "was altered after it was written: it"
            raise CheckpointError(f"{file} {how} has {size} bytes where {expected['bytes']} were written; {remedy}")
        if _entry(file)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{file} was altered after it was written (SHA-256 differs); {remedy}")
        if nested and file.name == MANIFEST:
            verify(file.parent, remedy=remedy)
    return manifest


def verify_if_sealed(folder: Path) -> None:
    """Verify a folder of weights if it is one of ours; a foreign one has no manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
    """
    if is_sealed(folder):
        remedy = "copy the whole folder again. If you changed it on purpose, delete its manifest.json"
        verify(Path(folder), remedy=remedy)


def _read(folder: Path, remedy: str) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256", None)
        files = manifest["files"]
        whole = all(isinstance(entry["sha256"], str) for entry in files.values())
        # Earlier versions wrote neither the format nor a digest of the manifest itself.
        whole = whole and (digest == _digest(manifest) if digest or "format" in manifest else True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); {remedy}") from error
    if not whole or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CheckpointError(f"{path} was altered after it was written; {remedy}")
    return manifest


def _is_ours(path: Path) -> bool:
    """Whether this is a manifest as we write them, be it damaged; other tools' are whole JSON without digests."""
    if not path.is_file():
        return False
    try:
        text = path.read_bytes()
        return b"sha256" in text or json.loads(text) is None
    except (OSError, ValueError, RecursionError):
        return True  # its reader reports what is wrong


def _entry(path: Path) -> dict[str, Any]:
    keys = _OPEN_KEYS.get(path.name, ())
    if keys:
        try:
            content = json.loads(path.read_bytes())
            return {"sha256": _digest({key: value for key, value in content.items() if key not in keys})}
        except (ValueError, AttributeError, RecursionError):
            pass  # no such file of settings: its bytes count
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
