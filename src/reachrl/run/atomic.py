"""Atomic writes of files and folders: complete or absent, whenever the process is killed."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from reachrl.errors import StorageError
from reachrl.run.process_identity import ProcessIdentity, is_running

T = TypeVar("T")

# What a full, read-only or broken disk answers. Anything else (a bug in the caller) keeps its traceback.
STORAGE_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EIO,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ESTALE,
        errno.ENAMETOOLONG,
    }
)
# Of the process that writes it: where its id means something, the id, its start; then a random part. Earlier versions
# wrote the process id alone.
_LEFTOVER = re.compile(
    r"^(?P<name>.+)\.(?P<role>tmp|old)-"
    r"(?:(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}|\d+)$",
    re.DOTALL,
)
_ABANDONED_S = 3600.0  # a writer in another container or on another machine touches its copy more often
# Rust and C++ libraries (safetensors, parquet) wrap the operating system's error in their own message.
_WRAPPED_ERRNO = re.compile(r"(?:os error|errno)\D{0,2}(\d+)", re.IGNORECASE)


def storage_errno(error: BaseException) -> int | None:
    """Return the errno if `error` says that the disk refused a write, else None."""
    number = getattr(error, "errno", None)
    if number is None:
        match = _WRAPPED_ERRNO.search(str(error))
        number = int(match.group(1)) if match else None
    return number if number in STORAGE_ERRNOS else None


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a refused write into a `StorageError` that names the file.

    Args:
        path: What is being written, for the message.

    Raises:
        StorageError: The disk is full, read-only or forbids the write.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = errno.ENOENT if _has_no_place(path, error) else storage_errno(error)
        if number is None:
            raise
        raise StorageError(
            f"could not write {path}: {os.strerror(number)}. Files written earlier are intact. "
            "Free some space or correct the permissions there, then run the same command again: it resumes."
        ) from error


def _has_no_place(path: Path, error: Exception) -> bool:
    """Whether a write failed because its folder is gone or cannot be made: a deleted working directory, /proc."""
    if not isinstance(error, FileNotFoundError) or error.filename is None:
        return False
    missing = Path(os.fsdecode(error.filename))
    return missing.parent == Path(path).parent or missing in Path(path).parents


def fsync_folder(path: Path) -> None:
    """Make the names inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent) / name, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def aside(path: Path, role: str = "tmp") -> Path:
    """Name a temporary copy of `path`, in the same folder, that no other process or thread uses.

    Args:
        path: what is written.
        role: `tmp`, half-written; `old`, an earlier folder until the new one has its name.
    """
    own = ProcessIdentity.own()
    return path.with_name(f"{path.name}.{role}-{own.place}-{own.pid}-{own.started}-{secrets.token_hex(4)}")


def _in_use(entry: Path, match: re.Match[str]) -> bool:
    """Whether the process that wrote a temporary copy may still be using it."""
    own = ProcessIdentity.own()
    if match["place"] == own.place:
        pid, started = int(match["pid"]), int(match["started"])
        return (pid, started) != (own.pid, own.started) and is_running(pid, started)
    # Its process cannot be looked up. A folder set aside goes back at once: it is so for the moment of one rename.
    return match["role"] == "tmp" and time.time() - _last_touched(entry) < _ABANDONED_S


def _last_touched(path: Path) -> float:
    """When a file, or any file below a folder, was last written, in seconds since the epoch."""
    times = [0.0]
    for entry in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            times.append(entry.lstat().st_mtime)
    return max(times)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def recover(path: Path) -> None:
    """Clean up after a crash: restore the folder that `path` was renamed from, delete half-written copies.

    Copies that belong to another process that is still alive are left alone; so are half-written ones from another
    machine or container until nothing has touched them for an hour.
    """
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        match = _LEFTOVER.match(entry.name)
        if match is None or match["name"] != path.name:
            continue
        if _in_use(entry, match):
            continue
        if match["role"] == "old" and not path.exists():
            entry.rename(path)  # killed between the two renames: the earlier folder is the good one
        else:
            _discard(entry)


def recover_tree(folder: Path) -> None:
    """Apply `recover` to every leftover anywhere below `folder`."""
    for parent, folders, names in os.walk(folder):
        originals = {match["name"] for entry in [*folders, *names] if (match := _LEFTOVER.match(entry))}
        for name in originals:
            recover(Path(parent) / name)
        folders[:] = [entry for entry in folders if not _LEFTOVER.match(entry)]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file aside, which is renamed to `path` once it is written, or deleted if that fails.

    Args:
        path: The file; its folder is created.

    Raises:
        StorageError: The disk refused the write; what was at `path` before is still there.
    """
    copy = aside(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        try:
            yield copy
            os.replace(copy, path)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a whole file aside, flush it to the disk and rename it into place.

    Args:
        path: The file; its folder is created.
        data: The whole content.

    Raises:
        StorageError: The disk refused the write; what was at `path` before is still there.
    """
    path = Path(path)
    with replacing(path) as copy, open(copy, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with storage_errors(path):
        fsync_folder(path.parent)


def utf8(text: str) -> bytes:
    """Encode text; bytes of file names that are no UTF-8 become escapes, which JSON reads back as they were."""
    return text.encode("utf-8", "backslashreplace")


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON in one piece; see `write_bytes_atomic`.

    Args:
        path: The file; its folder is created.
        obj: Anything `json` accepts, numpy scalars and arrays, and paths. Non-finite numbers become null.
    """
    text = json.dumps(jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, utf8(text + "\n"))


def replace_folder_atomic(path: Path, fill: Callable[[Path], T]) -> T:
    """Build a folder aside and rename it into place, replacing the one that was there.

    Args:
        path: The folder as it will be named.
        fill: Called with an empty folder; writes everything into it. If it raises, nothing changes.

    Returns:
        What `fill` returned.

    Raises:
        StorageError: The disk refused a write; what was at `path` before is still there.
    """
    path = Path(path)
    copy, old = aside(path), aside(path, "old")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        try:
            copy.mkdir()
            result = fill(copy)
            _fsync_tree(copy)
            if path.exists():
                path.rename(old)
            copy.rename(path)
        except BaseException:
            recover(path)
            raise
        fsync_folder(path.parent)
        _discard(old)
    return result


def jsonable(obj: Any) -> Any:
    """Return `obj` in the types JSON has: numpy becomes lists and numbers, NaN and infinities become None."""
    if isinstance(obj, dict):
        return {str(key): jsonable(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [jsonable(value) for value in (sorted(obj) if isinstance(obj, set | frozenset) else obj)]
    if isinstance(obj, float):
        return obj if obj - obj == 0 else None
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if hasattr(obj, "tolist"):  # numpy and torch scalars and arrays, without importing either
        return jsonable(obj.tolist())
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    raise TypeError(f"{type(obj).__name__} cannot be written as JSON: {obj!r}")
