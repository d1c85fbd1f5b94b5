"""The parent's handle on one expert worker: talk to it, hear why it died, end it."""

from reachrl.child import Child
from reachrl.demos.expert import Attempt, WorkerSetup


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
        self._child = Child("reachrl.demos.expert", variables)
        self.pipe = self._child.pipe
        self.send(setup)

    def send(self, message: WorkerSetup | Attempt | None) -> None:
        """Hand over a message; that nobody took it shows when the answer is read."""
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process is gone: reading its answer reports that, with its last words

    def epitaph(self) -> str:
        """How the process ended and what it last wrote to stderr."""
        how, words = self._child.epitaph()
        return f"{how} (its last words: {words})" if words else how

    def stop(self) -> None:
        """End the process: at once when it is busy, else after it has closed its simulator."""
        self.send(None)
        self._child.end(patience_s=5.0 if self.ready and self.attempt is None else 0.0)
