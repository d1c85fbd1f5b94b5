"""Calls to Ray actors that never wait for ever, and say who was lost."""

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
    """A process elsewhere, by name.

    Args:
        name: for people.
        handle: Ray's.
        deadline_s: a call that takes longer is given up.
    """

    def __init__(self, name: str, handle: Any, deadline_s: float) -> None:
        self.name, self.handle, self.deadline_s = name, handle, deadline_s

    def begin(self, method: str, *arguments: Any) -> "Call":
        """Send a call and return at once."""
        return Call(self, method, getattr(self.handle, method).remote(*arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        """Send a call and wait for its answer; see `Call.result`."""
        return self.begin(method, *arguments).result()

    def kill(self) -> None:
        """End the process now, whatever it is doing."""
        ray.kill(self.handle, no_restart=True)


class RemoteFuture:
    """Work under way whose end somebody has to wait for.

    Args:
        wait: waits and returns what came of it.
    """

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.result = wait


class Call:
    """One call that is under way.

    Args:
        remote: who does it.
        method: what.
        reference: Ray's handle on the answer.
    """

    def __init__(self, remote: Remote, method: str, reference: Any) -> None:
        self.remote, self.method, self.reference = remote, method, reference

    def result(self, *, company: Sequence["Call"] = ()) -> Any:
        """The answer.

        Args:
            company: calls of others that cannot end well before this one: if one of them ends, its process is lost.

        Raises:
            Lost: a process died or did not answer in time.
            ReachRLError: what the call itself raised; anything else it raised comes as Ray's own error.
        """
        everyone, remote = [self, *company], self.remote
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
            raise (_reason(everyone) if company else error) from None

    def answer(self) -> Any:
        """The answer of a call that has ended.

        Raises:
            Lost: its process died, or the answer went with its machine.
            ReachRLError: what it raised; anything else that it raised comes as Ray's own error.
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
    """Why one of several processes that work together failed.

    Whoever talks to a process that dies fails as well: the loss counts, then what the first of them raised.
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
    """The call's answer, from a successor if need be.

    Args:
        call: under way.
        again: replaces the process that was lost and sends the call anew.
        max_losses: how often in a row.

    Raises:
        WorkerError: it was lost once more.
        ReachRLError: what the call itself raised.
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
