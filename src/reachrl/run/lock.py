"""One writer a run folder: a lock file that names its owner and outlives nobody."""

import contextlib
import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from reachrl.errors import ConfigError
from reachrl.run.atomic import storage_errors


def _started(pid: int) -> float | None:
    """Return when a process started (seconds since the epoch), or None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


class RunLock:
    """Owns a run folder from `acquire` to `release`; a lock whose process is dead is taken over.

    A kernel lock alone would be inherited by forked workers and survive their parent, so the file records
    the owner (host, process id and start time, which tells a reused id apart) and the kernel lock only
    guards the look-and-write.
    """

    def __init__(self, path: Path) -> None:
        """Name the lock file; nothing is touched yet."""
        self.path = Path(path)
        self._token = uuid.uuid4().hex

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[IO[str]]:
        with storage_errors(self.path), open(self.path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
            file.seek(0)
            yield file

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: Another living process, or one on another machine, holds it.
        """
        with self._guarded() as file:
            owner = _parse(file.read())
            if owner and not self._stale(owner):
                raise ConfigError(
                    f"{self.path.parent} is being written by process {owner['pid']} on {owner['host']}. Wait for it, "
                    f"stop it, or choose another folder (--run or --out); if it is surely gone, delete {self.path}"
                )
            record = {
                "pid": os.getpid(),
                "started": _started(os.getpid()),
                "host": platform.node(),
                "token": self._token,
            }
            file.truncate(0)
            file.write(json.dumps(record))

    def _stale(self, owner: dict) -> bool:
        if owner["host"] != platform.node():
            return False  # cannot look into another machine
        if owner["pid"] == os.getpid():
            return True  # an earlier Run object of this same process
        return _started(owner["pid"]) != owner["started"]

    def release(self) -> None:
        """Give the lock back if it is still ours; emptied, not deleted, so that no waiter holds a ghost."""
        if not self.path.exists():
            return
        with self._guarded() as file:
            if _parse(file.read()).get("token") == self._token:
                file.truncate(0)


def _parse(text: str) -> dict:
    try:
        owner = json.loads(text)
        return owner if {"pid", "started", "host"} <= owner.keys() else {}
    except (ValueError, AttributeError):
        return {}  # empty, or killed while writing it: nobody's
