"""Programs under test in processes that are forked from one which has imported everything: four seconds less for each.

What a fork cannot show, how a fresh interpreter begins, a few tests show by starting one.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    *("torch", "torch._dynamo", "numpy", "av", "PIL.Image", "transformers.models.llama.modeling_llama"),
    *("tensorboard.summary.writer.event_file_writer", "tensorboard.compat.proto.event_pb2", "reachrl.cli.app"),
    *("reachrl.pipeline", "reachrl.loop", "reachrl.backends.local", "reachrl.policies.openvla.policy"),
    *("reachrl.policies.openvla.storage", "reachrl.rewards.process.reward", "reachrl.algorithms.ppo"),
    *("reachrl.curriculum.success_rate", "reachrl.testing.envs", "reachrl.report.report"),
    *("reachrl.backends.data_parallel", "reachrl.algorithms.grpo", "peft.tuners.lora"),
)  # not pyarrow: it starts a thread


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, pid: int, ended: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
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
            self.returncode = int(self._ended.recv(16))
            self._ended.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        said = []
        for file in (self._out, self._err):
            file.seek(0)
            said.append(file.read().decode())
        return said[0], said[1]

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forker:
    """The process that has imported everything, seen from the tests; it ends with this process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)

    def start(
        self, program: str, *arguments: str, cwd: Path | None = None, together: bool = False, **variables: str
    ) -> Forked:
        """Start `python -m MODULE` or `python FILE.py`.

        Args:
            program: a module or a file.
            arguments: of its command line.
            cwd: where it runs.
            together: whether stderr goes where stdout goes.
            variables: of its environment, besides this process's.
        """
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        request = {
            "program": program,
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
        }
        content = json.dumps(request).encode()
        files = [out.fileno(), (out if together else err).fileno(), theirs.fileno()]
        socket.send_fds(self._socket, [len(content).to_bytes(8, "big")], files)
        self._socket.sendall(content)
        theirs.close()
        pid = int.from_bytes(self._socket.recv(8), "big")
        assert pid, "the process that forks has ended"
        return Forked(pid, ours, out, err)


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


# --- in the process that forks ------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork for each request until the tests' end of the connection is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose threads"
    running: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            report_ended(running)
        if connection in ready:
            size, files, _, _ = socket.recv_fds(connection, 8, 3)
            if not size:
                return
            content = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                become(json.loads(content), files)
            for file in files[:2]:
                os.close(file)
            running[pid] = socket.socket(fileno=files[2])
            connection.sendall(pid.to_bytes(8, "big"))


def report_ended(running: dict[int, socket.socket]) -> None:
    """Tell who waits for them the codes of commands that have ended."""
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with running.pop(pid) as waiting:
                try:
                    waiting.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                except BrokenPipeError:
                    pass  # nobody waits for it


def become(request: dict, files: list[int]) -> None:
    """Go on as the program in this fork; does not return."""
    for number, target in zip(files[:2], (1, 2), strict=True):
        os.dup2(number, target)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.closerange(3, 256)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    program, here = request["program"], request["cwd"]
    is_file = program.endswith(".py")
    sys.path[:] = dict.fromkeys([str(Path(program).parent) if is_file else here, *places, *sys.path[1:]])
    sys.argv = [program, *request["arguments"]]
    code = 1
    try:
        if is_file:
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        finish(code)


def finish(code: int) -> None:
    """End as an interpreter does, without what belongs to the process that forks."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
