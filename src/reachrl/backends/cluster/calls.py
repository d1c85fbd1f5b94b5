"""Calls to Ray actors with a deadline and errors that name the lost process."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from reachrl.errors import ReachRLError, WorkerError

log = logging.getLogger(__name__)

_SETTLE_S = 5.0  # until all who worked with a lost process have noticed


class Lost(Exception):
    """A process died or did not answer in time.

    Args:
        name: which one.
        why: what happened.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} {why}")
        self.name = name


class Remote:
    """A named Ray actor.

    Args:
        name: for messages.
        handle: Ray's actor handle.
        deadline_s: seconds after which a call counts as lost.
    """

    def __init__(self, name: str, handle: Any, deadline_s: float) -> None:
        self.name, self.handle, self.deadline_s = name, handle, deadline_s

    def begin(self, method: str, *arguments: Any) -> "Call":
        """Send a call and return at once."""
        return Call(self, method, getattr(self.handle, method).remote(*arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        """Send a call and wait for its result; see `Call.result`."""
        return self.begin(method, *arguments).result()

    def kill(self) -> None:
        """Kill the process now."""
        ray.kill(self.handle, no_restart=True)


class Call:
    """A call in flight.

    Args:
        remote: the called actor.
        method: name of the called method.
        reference: Ray's object reference of the result.
    """

    def __init__(self, remote: Remote, method: str, reference: Any) -> None:
        self.remote, self.method, self.reference = remote, method, reference

    def result(self, *, concurrent: Sequence["Call"] = ()) -> Any:
        """Wait for the call and return its result.

        Args:
            concurrent: calls to other actors that run at least as long as this one: if one of them ends first, its
                process is lost.

        Raises:
            Lost: a process died or did not answer in time.
            ReachRLError: what the call itself raised; anything else it raised comes as Ray's own error.
        """
        everyone, remote = [self, *concurrent], self.remote
        ready, _ = ray.wait([call.reference for call in everyone], num_returns=1, timeout=remote.deadline_s)
        if not ready:
            raise Lost(
                remote.name,
                f"did not finish {self.method!r} within {remote.deadline_s:g} s (backend.deadline_s)",
            )
        if self.reference not in ready:
            raise _reason(everyone)
        try:
            return self.answer()
        except RayTaskError as error:
            raise (_reason(everyone) if concurrent else error) from None

    def answer(self) -> Any:
        """The result of a call that has ended.

        Raises:
            Lost: its process died, or the result was lost with its machine.
            ReachRLError: raised by the call; any other exception arrives as Ray's error.
        """
        try:
            return ray.get(self.reference, timeout=self.remote.deadline_s)
        except RayTaskError as error:
            if isinstance(error.cause, ReachRLError):
                raise error.cause from None
            raise
        except RayError as error:
            raise Lost(self.remote.name, f"died during {self.method!r}: {_first_line(error)}") from error


def _reason(calls: Sequence[Call]) -> Exception:
    """The root cause of a failure of processes that communicate.

    A process that talks to a dead one fails too: a lost process takes precedence, then the first exception raised.
    """
    references = [call.reference for call in calls]
    ray.wait(references, num_returns=len(references), timeout=_SETTLE_S)
    ended, _ = ray.wait(references, num_returns=len(references), timeout=0)
    raised: list[Exception] = []
    for call in calls:
        if call.reference in ended:
            try:
                call.answer()
            except Lost as lost:
                return lost
            except Exception as error:
                raised.append(error)
            else:
                raised.append(Lost(call.remote.name, f"ended {call.method!r} before its time"))
    return raised[0]


def insist(call: Call, again: Callable[[], Call], *, max_losses: int) -> Any:
    """The call's result; a lost process is respawned and the call retried.

    Args:
        call: in flight.
        again: respawns the process and sends the call again.
        max_losses: how often in a row.

    Raises:
        WorkerError: the process was lost more often than that.
        ReachRLError: raised by the call itself.
    """
    losses = 0
    while True:
        try:
            if losses:
                call = again()
            return call.result()
        except Lost as lost:
            losses += 1
            if losses > max_losses:
                raise WorkerError(f"{lost.name} was lost {losses} times in a row: {lost}") from lost
            log.warning("%s; another process takes its place", lost)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
