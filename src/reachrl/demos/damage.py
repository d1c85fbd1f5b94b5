"""Errors of unreadable files: absent, locked or forbidden ones apart from damaged ones."""

import errno
import os
from pathlib import Path

from reachrl.errors import StorageError

# What the operating system answers about a file whose content may be whole.
_CANNOT_OPEN = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EBUSY,
        errno.EMFILE,
        errno.ENFILE,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOMEM,
    }
)
_LOCKED = frozenset({errno.EAGAIN, errno.EDEADLK, errno.ETXTBSY})


def unreadable(
    path: Path, error: Exception, *, remedy: str, missing: str = "missing", damage: str = "truncated or damaged"
) -> StorageError:
    """The error to raise for a file that could not be read.

    Args:
        path: the file.
        error: what the library that read it raised.
        remedy: what to do where the file is missing or its content is damaged.
        missing: what is said of a file that is not there.
        damage: what is wrong with the content where the operating system has nothing to say about the file.
    """
    number = getattr(error, "errno", None)
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{path}: {missing}. {remedy}")
    if number in _LOCKED or "already open for write" in text:
        return StorageError(
            f"{path}: locked: a program has it open for writing, or died with it open. Let that program finish, or "
            "close it; if none is running,  h5clear -s FILE  takes an HDF5 file's mark away."
        )
    if number == errno.ENOLCK:
        return StorageError(
            f"{path}: this file system offers no file locks (it may be a network share). Copy the file to a local "
            "disk, or set HDF5_USE_FILE_LOCKING=FALSE if nobody writes to it."
        )
    if number in _CANNOT_OPEN:
        return StorageError(
            f"{path}: cannot be opened ({os.strerror(number)}); that says nothing about its content. Correct the "
            "permissions or limits (ulimit -n) and run the same command again."
        )
    return StorageError(f"{path}: {damage} ({text}). {remedy}")
