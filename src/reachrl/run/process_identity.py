"""Identity of a process across machines, containers and reuse of process ids, and whether it still runs."""

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process, told apart from those of other machines, containers and times."""

    host: str  # for messages
    boot: str  # the kernel's boot id: another machine, or the same one started again, has another
    namespace: str  # of process ids: containers on one machine each have a process 1
    pid: int
    started: int  # clock ticks since boot; tells a process from a later one with its id

    @classmethod
    def own(cls) -> Self:
        """The calling process."""
        pid = os.getpid()
        return cls(host=platform.node(), boot=boot_id(), namespace=pid_namespace(), pid=pid, started=start_of(pid) or 0)

    @property
    def place(self) -> str:
        """Eight hex digits for where its id means something: one boot of one machine, one namespace."""
        return _digest(self.boot, self.namespace)

    def alive(self) -> bool | None:
        """Whether it still runs; None if that cannot be known from here: its id belongs to another place."""
        if (self.boot, self.namespace) != (boot_id(), pid_namespace()):
            return None
        return is_running(self.pid, self.started)


def boot_id() -> str:
    """The kernel's boot id; the host's name where there is none."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def pid_namespace() -> str:
    """The namespace that this process's id belongs to, such as `pid:[4026531836]`; empty where there is none."""
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> int | None:
    """When a process of this namespace started, in clock ticks since boot; None if it is gone or cannot be seen."""
    if not (_PROC / "self/stat").exists():
        seconds = seconds_of(pid)
        return None if seconds is None else round(100 * seconds)
    if pid != os.getpid() and not _proc_is_ours():
        return None
    try:
        stat = (_PROC / ("self" if pid == os.getpid() else str(pid)) / "stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 1 :].split()  # the command's name before it may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def seconds_of(pid: int) -> float | None:
    """When a process of this namespace started, in seconds since the epoch; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def is_running(pid: int, started: int) -> bool:
    """Whether the process of this namespace that had this id and this start still runs."""
    now = start_of(pid)
    if now is not None:
        return now == started
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # somebody else's
    except (ProcessLookupError, OverflowError):
        return False
    # It exists without a start: hidden from this user, in a /proc of another namespace, or else a zombie.
    return not _proc_is_ours() or not (_PROC / str(pid)).exists()


def _proc_is_ours() -> bool:
    """Whether /proc counts processes as this one does; a namespace may be entered without mounting its own."""
    try:
        return os.readlink(_PROC / "self") == str(os.getpid())
    except OSError:
        return False


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
