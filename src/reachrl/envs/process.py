"""The parent's handle on one worker process: start it, talk to it under a deadline, end it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from typing import Any

# One thread each, as the workers themselves fill the cores. Large blocks go back to the system when freed; the
# heap's end does not, as drawing takes and frees it several times a frame (a twentieth of a decision in page faults).
_SETTINGS = {
    "LP_NUM_THREADS": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
}


class WorkerLost(Exception):
    """The worker died, did not answer in time or raised; the message says which.

    Args:
        message: what happened, with the worker's own words.
        kind: name of the `reachrl.errors` class it raised, if it raised one of those.
    """

    def __init__(self, message: str, kind: str | None = None):
        super().__init__(message)
        self.kind = kind


class WorkerProcess:
    """A child process that runs `reachrl.envs.worker`.

    Args:
        setup: its first message: kind, config, row, num_envs, image_size, memory (a file descriptor).
        variables: environment variables it gets besides ours.
    """

    def __init__(self, setup: dict[str, Any], variables: dict[str, str]):
        self.connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()
        fds = (theirs.fileno(), setup["memory"])
        search_path = [os.path.abspath(folder) for folder in sys.path]
        environment = os.environ | _SETTINGS | variables | {"PYTHONPATH": os.pathsep.join(search_path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "reachrl.envs.worker", str(fds[0]), str(os.getpid())],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            env=environment,
        )
        theirs.close()
        self._send(setup)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, **command: Any) -> None:
        """Hand over a command; `receive` brings the answer, or the news that nobody took it."""
        self._send(command)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process is gone: reading its answer reports that, with its last words

    def receive(self) -> dict[str, Any]:
        """The answer to the last command, which must have arrived.

        Raises:
            WorkerLost: the process ended, or it reports an exception.
        """
        try:
            reply = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise WorkerLost(self._epitaph()) from None
        if "error" in reply:
            raise WorkerLost(reply["error"].strip(), reply["kind"])
        return reply

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code}"
        self._stderr.seek(0)
        words = self._stderr.read()[-2000:].decode(errors="replace").strip()
        return f"{how}; its last words:\n{words}" if words else how

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.wait()
        self.connection.close()
        self._stderr.close()
