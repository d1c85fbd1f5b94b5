"""The parent's handle on one expert worker: start it, hear why it died, end it."""

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe

from reachrl.demos.expert import Attempt, WorkerSetup

_ONE_THREAD = ("LP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ExpertProcess:
    """A child process that runs `reachrl.demos.expert`, with what it is doing now."""

    def __init__(self, setup: WorkerSetup, variables: dict[str, str], deadline: float) -> None:
        """Start the worker and send its setup.

        Args:
            setup: its first message.
            variables: environment variables it gets besides ours.
            deadline: `time.monotonic()` by which its first answer is due, in seconds.
        """
        self.deadline = deadline
        self.ready = False
        self.attempt: Attempt | None = None
        self.step = 0
        self.pipe, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # lives as long as the process
        search_path = [os.path.abspath(folder) for folder in sys.path]
        ours = dict.fromkeys(_ONE_THREAD, "1") | {"PYTHONPATH": os.pathsep.join(search_path)}
        environment = os.environ | variables | ours
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "reachrl.demos.expert", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            env=environment,
        )
        theirs.close()
        self.send(setup)

    def send(self, message: WorkerSetup | Attempt | None) -> None:
        """Hand over a message; that nobody took it shows when the answer is read."""
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process is gone: reading its answer reports that, with its last words

    def epitaph(self) -> str:
        """How the process ended and what it last wrote to stderr."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self._stderr.seek(0)
        words = self._stderr.read()[-2000:].decode(errors="replace").strip()
        return f"{how} (its last words: {words})" if words else how

    def stop(self) -> None:
        """End the process: at once when it is busy, else after it has closed its simulator."""
        self.send(None)
        try:
            self._process.wait(timeout=5.0 if self.ready and self.attempt is None else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.pipe.close()
        self._stderr.close()
