"""Worker processes with one simulator each: a parent sends commands, the process answers them.

A message is a JSON object. A reply with much data brings it as bytes in a message of its own. While a command is
carried out, the process may send notices.
"""

import json
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from reachrl.child import Child, limit_reached, pipe_to_parent
from reachrl.errors import ConfigError, ReachRLError

Notify = Callable[[dict[str, Any]], None]


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
    """The parent's side of a worker process.

    Args:
        module: what the process runs, dotted; it calls `run_worker`.
        setup: its first message.
        variables: environment variables it gets besides ours.
        files: file descriptors it inherits.
    """

    def __init__(self, module: str, setup: dict[str, Any], variables: dict[str, str], files: Sequence[int] = ()):
        self._child = Child(module, variables, files)
        self.connection = self._child.pipe
        self._send(setup)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def send(self, **command: Any) -> None:
        """Send a command, `do` and arguments; `receive` returns the answer, or raises if the process is gone."""
        self._send(command)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the process is gone: reading its answer reports that, with its last words

    def receive(self) -> dict[str, Any]:
        """The next reply or notice, which must have arrived; bytes that a reply brings are its `data`.

        Raises:
            WorkerLost: the process ended, or it reports an exception.
        """
        try:
            reply = json.loads(self.connection.recv_bytes())
            if reply.get("data"):
                reply["data"] = self.connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            how, words = self._child.epitaph()
            raise WorkerLost(f"it {how}; its last words:\n{words}" if words else f"it {how}") from None
        if "error" in reply:
            raise WorkerLost(reply["error"].strip(), reply["kind"])
        return reply

    def kill(self) -> None:
        """End the process now."""
        self._child.end()


def run_worker(make: Callable[[dict[str, Any], Notify], Any]) -> None:
    """The whole of a worker process: answer commands until the parent closes the pipe or goes away.

    Args:
        make: builds, from the setup, the object whose methods are the commands; each returns a reply as a dict, in
            which `data` may be bytes. It is called when the first command comes, so that what it raises is answered.
    """
    _answer_commands(pipe_to_parent(), make)
    os._exit(0)  # GL libraries complain when Python tears them down


def _answer_commands(pipe: Connection, make: Callable[[dict[str, Any], Notify], Any]) -> None:
    def send(message: dict[str, Any]) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    setup, worker = json.loads(pipe.recv_bytes()), None
    while True:
        try:
            command = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        data = None
        try:
            if worker is None:
                worker = make(setup, send)
            reply = getattr(worker, command.pop("do"))(**command)
            if (data := reply.get("data")) is not None:
                reply["data"] = True
        except ReachRLError as error:
            reply = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            limit = None if isinstance(error, BlockingIOError) else limit_reached(error)
            reply = {"error": limit or traceback.format_exc(), "kind": ConfigError.__name__ if limit else None}
        try:
            send(reply)
            if data is not None:
                pipe.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):
            return
