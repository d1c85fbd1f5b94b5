"""Child processes that step simulators: how the parent starts and ends one, and what one does to end with its parent.

Plain processes rather than `multiprocessing`: spawning there imports the parent's main script, and with it whatever
that imports, into every child.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from reachrl.errors import ConfigError
from reachrl.home import home_variables

# One thread each, as the children themselves fill the cores. Large blocks go back to the system when freed; the
# heap's end does not, as drawing takes and frees it several times a frame (a twentieth of a decision in page faults).
_SETTINGS = {
    "LP_NUM_THREADS": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
}
_LOOK_EVERY_S = 2.0
# Not PYTHONPATH, which cannot hold a folder with a colon in its name.
_RUN_MODULE = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


class Child:
    """A process that runs a module, which finds the pipe to this one by `pipe_to_parent`.

    Args:
        module: what it runs, dotted.
        variables: environment variables it gets besides ours.
        files: file descriptors it inherits, by the same numbers.
    """

    def __init__(self, module: str, variables: dict[str, str], files: Sequence[int] = ()) -> None:
        command = [sys.executable, "-P", "-c", _RUN_MODULE, json.dumps(search_path()), module]
        try:
            self.pipe, theirs = Pipe()
            with theirs:
                self._stderr = tempfile.TemporaryFile()  # lives as long as the process
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(), *files),
                    stdin=subprocess.DEVNULL,
                    stderr=self._stderr,
                    env=os.environ | home_variables() | _SETTINGS | variables,
                )
        except OSError as error:
            if (limit := limit_reached(error)) is None:
                raise
            raise ConfigError(f"a process that runs {module} could not be started: {limit}") from error

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def epitaph(self) -> tuple[str, str]:
        """How the process ended, such as `was ended by SIGKILL`, and what it last wrote to stderr."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its pipe", ""
        how = f"was ended by {signal_name(-code)}" if code < 0 else f"exited with code {code}"
        self._stderr.seek(0)
        return how, self._stderr.read()[-2000:].decode(errors="replace").strip()

    def end(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.wait()
        self.pipe.close()
        self._stderr.close()


def search_path() -> list[str]:
    """Where this process finds modules, as absolute folders, without relative ones in a deleted working directory."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return [folder for folder in sys.path if os.path.isabs(folder)]
    return [os.path.join(here, folder) if folder else here for folder in sys.path]


def signal_name(number: int) -> str:
    """The name of a signal, such as `SIGKILL` or `SIGRTMIN+3`."""
    try:
        return signal.Signals(number).name
    except ValueError:  # between the first and the last real-time signal
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > signal.SIGRTMIN else f"signal {number}"


def limit_reached(error: BaseException) -> str | None:
    """Which limit of the system an error tells of and what to do about it; None if it tells of none."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):  # of an import, say
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"too many open files (at most {files} in one process). Raise the limit (ulimit -n) or lower "
            "env.num_envs or demos.workers: each process takes about five"
        )
    if number in (errno.EAGAIN, errno.ENOMEM) or "can't start new thread" in str(error):
        return (
            f"the system gives no further process, thread or memory ({error}). Raise the limits on them (ulimit -u, "
            "ulimit -v, the container's) or lower env.num_envs or demos.workers"
        )
    return None


def pipe_to_parent() -> Connection:
    """The pipe to the parent, in a process that a `Child` has started; from now on this process ends with its parent.

    Ctrl-C, which reaches all of them, is left to the parent.
    """
    pipe, parent = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_without, args=(parent,), daemon=True).start()
    return Connection(pipe)


def _exit_without(parent: int) -> None:
    """End this process when its parent has gone, even in the middle of a simulator step."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
