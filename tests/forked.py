"""Programs under test in processes that are forked from one which has imported everything: four seconds less for each.

So are the processes that these programs start: those of environments, and where it is asked for, Ray's workers and the
ranks of `torchrun`. What a fork cannot show, how a fresh interpreter begins, a few tests show by starting one.
"""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

SERVER = str(Path(__file__).with_name("fork_server.py"))
FORKS = "REACHRL_TEST_FORKS"  # folder of the process that forks: its socket and its stand-in for an interpreter

# Started as `python ARGUMENTS`: asks for a fork that is this program, and lives and dies with it.
STAND_IN = """#!{python} -ISE
import json, os, signal, socket, sys
arguments = sys.argv[1:]
program = next((each for each in arguments if each not in ("-u", "-m")), "")
if program != "reachrl" and not program.endswith("/setup_worker.py"):
    os.execv({python!r}, [{python!r}, *arguments])
arguments = arguments[arguments.index(program) + 1 :]
files = [number for number in map(int, os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd/%d" % number)]
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = dict(program=program, arguments=arguments, cwd=os.getcwd(), environment=dict(os.environ), files=files)
    request |= dict(parent=os.getppid(), group=os.getpgrp(), session=os.getsid(0))
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], files)
    server.sendall(content)
    pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.path.exists("/proc/%d" % pid) and os.kill(pid, number))
    code = int(server.recv(16) or b"1")
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, pid: int, ended: socket.socket, out: IO[bytes] | None = None, err: IO[bytes] | None = None):
        self.pid, self.returncode = pid, None
        self._ended, self._out, self._err = ended, out, err

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = int(self._ended.recv(16) or b"-9")
            self._ended.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        said = []
        for file in (self._out, self._err):
            assert file is not None
            file.seek(0)
            said.append(file.read().decode())
        return said[0], said[1]

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(folder: str, files: dict[int, int], **request: Any) -> tuple[int, socket.socket]:
    """Ask the process that forks for one.

    Args:
        folder: of the process that forks.
        files: numbers of open files by the numbers they get there.
        request: what it becomes.

    Returns:
        Its process id, and a socket that tells its exit code. Processes with a `parent` end when this is closed.
    """
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{folder}/socket")
    content = json.dumps(request | {"files": list(files)}).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], list(files.values()))
    server.sendall(content)
    pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
    assert pid, "the process that forks has ended"
    return pid, server


class Forker:
    """The process that has imported everything, seen from the tests; it ends with the process that started it."""

    def __init__(self) -> None:
        if FORKS in os.environ:  # of the process that shares tests out among several
            self.folder = os.environ[FORKS]
            return
        self.folder = tempfile.mkdtemp(prefix="forks-")
        listener = listen(self.folder)
        self._alive, theirs = socket.socketpair()
        with theirs, listener:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, SERVER, self.folder, str(listener.fileno()), str(theirs.fileno())]
            passed = [listener.fileno(), theirs.fileno()]
            self._process = subprocess.Popen(command, pass_fds=passed, env=environment)

    def start(
        self,
        program: str,
        *arguments: str,
        cwd: Path | None = None,
        together: bool = False,
        family: bool = False,
        **variables: str,
    ) -> Forked:
        """Start `python -m MODULE` or `python FILE.py`.

        Args:
            program: a module or a file.
            arguments: of its command line.
            cwd: where it runs.
            together: whether stderr goes where stdout goes.
            family: whether Ray's workers and ranks that it starts are forked too, all from a child of its own.
            variables: of its environment, besides this process's.
        """
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), FORKS: self.folder}
        environment = os.environ | here | variables
        pid, ended = fork(
            self.folder,
            {1: out.fileno(), 2: (out if together else err).fileno()},
            program=program,
            arguments=arguments,
            cwd=str(cwd or Path.cwd()),
            environment=environment,
            family=family,
        )
        return Forked(pid, ended, out, err)


def listen(folder: str) -> socket.socket:
    """A socket for requests in a folder, and beside it what asks there in an interpreter's place."""
    stand_in = Path(folder) / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable, address=f"{folder}/socket"))
    stand_in.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket")
    listener.listen(64)
    return listener


@functools.cache
def forker() -> Forker:
    """One for all tests of this process."""
    return Forker()


def start_reachrl(*arguments: str, **options: Any) -> Forked:
    """Start `reachrl ARGUMENTS`; the options are those of `Forker.start`."""
    return forker().start("reachrl", *arguments, **options)


def run_reachrl(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `reachrl ARGUMENTS` to its end."""
    process = start_reachrl(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(["reachrl", *arguments], process.wait(), out, err)


def ranks(size: int) -> list[dict[str, str]]:
    """What `torchrun` tells each of the processes of a group on this machine; nothing where there is one alone."""
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


# --- processes that a program starts ------------------------------------------------------------------


def start_child(
    command: list[str], *, pass_fds: Sequence[int], stdin: int, stderr: IO[bytes], env: dict[str, str]
) -> Forked:
    """In place of the `subprocess.Popen` of `reachrl.child`."""
    assert command[1:3] == ["-P", "-c"] and stdin == subprocess.DEVNULL, command
    folder = os.environ.get(FORKS) or forker().folder
    files = {1: 1, 2: stderr.fileno()} | {number: number for number in pass_fds}
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        cwd = "/"
    request = {"cwd": cwd, "environment": env, "parent": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0)}
    pid, ended = fork(folder, files, program="-c", code=command[3], arguments=command[4:], **request)
    return Forked(pid, ended)


def children_are_forked() -> SimpleNamespace:
    """What `reachrl.child` is to have for `subprocess`."""
    return SimpleNamespace(Popen=start_child, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)


@contextlib.contextmanager
def python_is_forked() -> Iterator[None]:
    """In this process `sys.executable` is the stand-in, for the Ray that is started meanwhile."""
    folder, before = forker().folder, (sys.executable, os.environ.get(FORKS))
    sys.executable, os.environ[FORKS] = f"{folder}/python", folder
    try:
        yield
    finally:
        sys.executable = before[0]
        if before[1] is None:
            del os.environ[FORKS]
