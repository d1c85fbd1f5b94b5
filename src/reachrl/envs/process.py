"""The parent's handle on one worker process: talk to it, hear why it is lost."""

import json
from typing import Any

from reachrl.child import Child


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
        setup: its first message: kind, code (`registry.send`), config, row, num_envs,
            memory (a file descriptor).
        variables: environment variables it gets besides ours.
    """

    def __init__(self, setup: dict[str, Any], variables: dict[str, str]):
        self._child = Child("reachrl.envs.worker", variables, files=(setup["memory"],))
        self.connection = self._child.pipe
        self._send(setup)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

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
            how, words = self._child.epitaph()
            raise WorkerLost(f"it {how}; its last words:\n{words}" if words else f"it {how}") from None
        if "error" in reply:
            raise WorkerLost(reply["error"].strip(), reply["kind"])
        return reply

    def kill(self) -> None:
        """End the process now."""
        self._child.end()
