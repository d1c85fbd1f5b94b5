"""Errors of the operating system as messages with a remedy; anything else is our bug and keeps its traceback."""

import os
import sys

from reachrl.child import limit_reached
from reachrl.errors import ConfigError, ReachRLError, StorageError
from reachrl.run.atomic import STORAGE_ERRNOS


def check_command_line() -> None:
    """Refuse names that no program but this one could be given.

    Raises:
        ConfigError: the working directory was deleted, or it or an argument has bytes that are no UTF-8.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the working directory was deleted; change into one that exists") from error
    for what, text in (("the working directory", here), *(("the argument", each) for each in sys.argv[1:])):
        if not _is_utf8(text):
            raise ConfigError(
                f"{what} {_shown(text)} has bytes that are no UTF-8, which reports and the libraries for videos and "
                "tables cannot name; rename it or choose another"
            )


def expected_failure(error: BaseException) -> ReachRLError | None:
    """The error to show instead of one that the system raised; None if `error` is our bug.

    Args:
        error: what reached the top.
    """
    if (limit := limit_reached(error)) is not None:
        return ConfigError(limit)
    if isinstance(error, UnicodeEncodeError) and isinstance(error.object, str) and not _is_utf8(error.object):
        return ConfigError(f"{_shown(error.object[:200])} has bytes that are no UTF-8; rename it")
    if not isinstance(error, OSError):
        return None
    if "No usable temporary directory" in str(error):
        return StorageError(f"{error.strerror or error}; set TMPDIR to a folder that can be written")
    if isinstance(error, FileNotFoundError) and not _working_directory_exists():
        return StorageError(
            "the working directory was deleted while the command ran; files that it had written there went with it. "
            "Change into one that exists"
        )
    if error.errno in STORAGE_ERRNOS:
        where = _shown(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else "?"
        return StorageError(
            f"{where}: {os.strerror(error.errno or 0)}. Free some space there, correct the permissions, or choose "
            "another place"
        )
    return None


def speak_any_language() -> None:
    """Print characters that the terminal's encoding lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _working_directory_exists() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return ascii(text) if not _is_utf8(text) else text
