"""One writer per run folder: a lock file that names its owner and is taken over once the owner is dead."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from reachrl.errors import ConfigError
from reachrl.run.atomic import storage_errors
from reachrl.run.process_identity import ProcessIdentity, boot_id, seconds_of

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without them


class RunLock:
    """Owns a run folder from `acquire` to `release`; a lock whose process is dead is taken over.

    The file records the owner: machine, boot, namespace of process ids, id and start. An owner of the same namespace
    is looked up. One of another container or machine cannot be; it counts as alive unless a kernel lock, which the
    owner holds on a second file for as long as it lives, proves otherwise. That lock is no proof on network file
    systems, which need not tell one machine of another's, and would alone be inherited by forked processes.
    """

    def __init__(self, path: Path) -> None:
        """Name the lock file; nothing is touched yet."""
        self.path = Path(path)
        self._token = uuid.uuid4().hex
        self._held: IO[bytes] | None = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[IO[str]]:
        """The file, locked for one read-modify-write."""
        with storage_errors(self.path), open(self.path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            file.seek(0)
            yield file

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: Another living process holds it, or one that cannot be looked up: on another machine, in
                another container.
        """
        with self._guarded() as file:
            record = _parse(file.read())
            if record and (reason := self._in_use(record)):
                raise ConfigError(
                    f"{self.path.parent} is being written by {reason}. Wait for it, stop it, or choose another folder "
                    f"(--run or --out); if it is surely gone, delete {self.path}"
                )
            own = asdict(ProcessIdentity.own()) | {"token": self._token, "held": self._hold()}
            file.truncate(0)
            file.write(json.dumps(own))

    def _in_use(self, record: dict[str, Any]) -> str | None:
        """The lock's owner, in words; None if no living process holds it."""
        who = f"process {record['pid']} on {record['host']}"
        if "boot" not in record:  # an earlier version's
            known_dead = record["host"] == platform.node() and seconds_of(record["pid"]) != record["started"]
            return None if known_dead else who
        owner, own = ProcessIdentity(**{each.name: record[each.name] for each in fields(ProcessIdentity)}), os.getpid()
        alive = owner.alive()
        if alive is None:
            if self._proves_death(record):
                return None
            same = owner.boot == boot_id()
            return f"{who}, in {'another container' if same else 'another container, machine or boot'}"
        return who if alive and owner.pid != own else None  # ours: an earlier Run object of this same process

    # ---- the kernel lock ----

    @property
    def _held_path(self) -> Path:
        return self.path.with_name(self.path.name + ".held")

    def _hold(self) -> list[int] | None:
        """Take the kernel lock for as long as this process lives; device and inode it is on, None without it."""
        file = open(self._held_path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # the file system has none, or an earlier Run object of this process has it
            file.close()
            return None
        self._held = file
        status = os.fstat(file.fileno())
        return [status.st_dev, status.st_ino]

    def _proves_death(self, record: dict[str, Any]) -> bool:
        """Whether the owner held the kernel lock where we would see it, and it is free now."""
        if not record.get("held"):
            return False
        try:
            with open(self._held_path, "ab") as file:
                status = os.fstat(file.fileno())
                same_kernel = record["boot"] == boot_id() and record["held"] == [status.st_dev, status.st_ino]
                on_a_disk = os.major(status.st_dev) != 0  # a block device's file system is mounted by one machine
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return same_kernel or on_a_disk
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock if it is still ours. The file is emptied, not deleted: waiters have it open."""
        if self._held is not None:
            self._held.close()
            self._held = None
        if not self.path.exists():
            return
        with self._guarded() as file:
            if _parse(file.read()).get("token") == self._token:
                file.truncate(0)


def _parse(text: str) -> dict[str, Any]:
    """The owner's record; empty (no owner) if the file is empty or was cut short by a kill."""
    known = {each.name for each in fields(ProcessIdentity)}
    try:
        record = json.loads(text)
        wanted = known if "boot" in record else {"pid", "started", "host"}
        return record if wanted <= record.keys() and isinstance(record["pid"], int) else {}
    except (ValueError, AttributeError, TypeError):
        return {}
