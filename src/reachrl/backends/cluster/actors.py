"""All actor processes behind the `Actors` interface of the training loop."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from reachrl.backends.base import Pending, Weights
from reachrl.backends.cluster.actor_process import Collected
from reachrl.backends.cluster.calls import Call, Remote, insist
from reachrl.backends.shares import even_shares, firsts, proportional_shares, step_time
from reachrl.backends.weights import PackedWeights
from reachrl.envs.base import Shown
from reachrl.rollout.collector import Assign
from reachrl.rollout.join import join_rollouts
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Rollout

log = logging.getLogger(__name__)

_LEAVE_S = 5.0
_WORTH_MOVING = 0.9  # environments move when a step then takes less than this part of its time


class _Actor:
    """One actor process, as seen from the training process."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.host = ""
        self.first = 0  # number of its first environment
        self.count = 0  # environments
        self.rows: list[dict[str, Any]] = []  # their running episodes when the last rollout was complete
        self.lost_episodes = 0  # since it has these environments
        self.seconds: float | None = None  # of the last rollout
        self.seconds_per_env: float | None = None  # of one step of one environment; None: not measured yet
        self.measured = 0  # rollouts with these environments


class ClusterActors:
    """Actor processes, each with a share of the environments.

    A lost actor is replaced, and its part of the rollout is collected again from the same state with the same weights
    and noise: the rollout does not depend on which process collected it.

    Args:
        processes: the actors.
        spawn: starts a new process for actor number i.
        total: environments of all actors together.
        least: minimum number of environments of an actor.
        max_losses: how often in a row an actor is replaced.
        rebalance: whether to move environments from slow actors to fast ones.

    Raises:
        WorkerError: an actor cannot be started.
    """

    def __init__(
        self,
        processes: Sequence[Remote],
        spawn: Callable[[int], Remote],
        *,
        total: int,
        least: int,
        max_losses: int,
        rebalance: bool,
    ) -> None:
        self._spawn, self._total, self._least, self._rebalance = spawn, total, least, rebalance
        self._actors = [_Actor(process) for process in processes]
        self._max_losses = max_losses
        self._weights: PackedWeights | None = None
        self._lost_before = 0
        self._redone = 0  # parts of rollouts collected again
        self._moved = 0  # times environments moved
        self._gap = 0.0
        self._log = SpanLog("actors")
        for actor, count in zip(self._actors, even_shares(total, len(processes)), strict=True):
            actor.count = count
        self._shown: Shown | None = None
        self._started = False  # simulators; a resumed run begins them where they were

    def shown(self) -> Shown:
        """What the environments show; they are begun for it."""
        if self._shown is not None:
            return self._shown
        self._start()
        found = self._shown = self._insist(0, self._actors[0].remote.begin("shown"))
        return found

    def _start(self) -> None:
        if not self._started:
            self._give_rows([actor.count for actor in self._actors], [])

    def load_weights(self, weights: Weights) -> int:
        """Send weights to every actor; each verifies them on a fixed batch."""
        assert isinstance(weights, PackedWeights)
        self._weights = weights
        self._start()
        self._balance_shares()
        self._ask_all("load_weights", lambda _: (weights,)).result()
        return weights.version

    def collect(self, assign: Assign, num_steps: int) -> Pending[Rollout]:
        """Begin a rollout in every actor."""
        # Stored as it is now: a part that is collected again must not see what the curriculum learns meanwhile.
        stored = ray.put(assign)
        parts = self._ask_all("collect", lambda _: (stored, num_steps))
        return Pending(lambda: self._finish(parts.result()))

    def metrics(self) -> dict[str, float]:
        """Counts of lost actors, repeated collections and moved environments, and the log-prob gap to the learner."""
        return {
            "lost_episodes": self._lost_before + sum(actor.lost_episodes for actor in self._actors),
            "redone_rollouts": self._redone,
            "moved_environments": self._moved,
            "weight_sync/gap": self._gap,
        }

    def take_spans(self) -> list[Span]:
        """Each actor's decoding and simulation spans."""
        return self._log.take()

    def balance(self) -> list[dict[str, Any]]:
        """Each actor's environments and seconds per step."""
        slowest = max((actor.seconds or 0.0) for actor in self._actors) or 1.0
        return [
            {
                "actor": number,
                "host": actor.host,
                "rows": actor.count,
                "seconds_per_step": actor.seconds_per_env,
                "busy": None if actor.seconds is None else actor.seconds / slowest,
            }
            for number, actor in enumerate(self._actors)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The running episodes by environment, as one process would keep them, and how many were lost so far."""
        rows = [row for actor in self._actors for row in actor.rows]
        return {"lost_episodes": self.metrics()["lost_episodes"], "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replay the running episodes, redistributed over the actors."""
        self._lost_before = state["lost_episodes"]
        self._give_rows([actor.count for actor in self._actors], state["rows"])

    def close(self) -> None:
        """Close the simulators; kill processes that are busy or stuck."""
        closing = [actor.remote.begin("close").reference for actor in self._actors]
        with contextlib.suppress(RayError):  # whatever state they are in, they are ended below
            ray.wait(closing, num_returns=len(closing), timeout=_LEAVE_S)
        for actor in self._actors:
            actor.remote.kill()

    # ---- rollouts ----

    def _finish(self, parts: Sequence[Collected]) -> Rollout:
        """Join the parts of the rollout, and record the actors' timing and state."""
        for actor, part in zip(self._actors, parts, strict=True):
            self._note(actor, part, len(part.rollout.valid))
        self._gap = max(part.gap for part in parts)
        self._log.extend(span for part in parts for span in part.spans)
        return join_rollouts([part.rollout for part in parts])

    def _note(self, actor: _Actor, part: Collected, num_steps: int) -> None:
        actor.rows, actor.lost_episodes, actor.seconds = part.rows, part.lost_episodes, part.seconds
        actor.measured += 1
        if actor.measured > 1:  # the first rollout begins episodes and warms up
            actor.seconds_per_env = part.seconds / (num_steps * actor.count)

    # ---- who has what ----

    def _balance_shares(self) -> None:
        """Move environments between actors where the time gained exceeds the cost of replaying their episodes."""
        known = [actor.seconds_per_env for actor in self._actors]
        seconds = [each for each in known if each is not None]
        if not self._rebalance or len(seconds) < len(self._actors):
            return
        now = [actor.count for actor in self._actors]
        shares = proportional_shares(self._total, seconds, least=self._least)
        before, after = step_time(now, seconds), step_time(shares, seconds)
        if after < _WORTH_MOVING * before:
            log.info("environments move from %s to %s: %.3f s a step, not %.3f s", now, shares, after, before)
            rows = [row for actor in self._actors for row in actor.rows]
            self._lost_before += sum(actor.lost_episodes for actor in self._actors)
            self._moved += 1
            self._give_rows(shares, rows)

    def _give_rows(self, shares: Sequence[int], rows: Sequence[dict[str, Any]]) -> None:
        for actor, count, first in zip(self._actors, shares, firsts(shares), strict=True):
            actor.first, actor.count, actor.rows = first, count, list(rows[first : first + count])
            actor.lost_episodes, actor.measured, actor.seconds_per_env = 0, 0, None
        self._started = True
        hosts = self._ask_all("take_rows", self._share).result()
        for actor, host in zip(self._actors, hosts, strict=True):
            actor.host = host

    def _share(self, number: int) -> tuple[int, int, list[dict[str, Any]]]:
        actor = self._actors[number]
        return actor.first, actor.count, actor.rows

    # ---- losses ----

    def _ask_all(self, method: str, arguments: Callable[[int], tuple]) -> Pending[list[Any]]:
        """Call `method` on every actor. `result()` waits; a lost actor is respawned and its call retried."""
        sent = [arguments(number) for number in range(len(self._actors))]
        calls = [actor.remote.begin(method, *own) for actor, own in zip(self._actors, sent, strict=True)]
        return Pending(lambda: [self._insist(number, call, *sent[number]) for number, call in enumerate(calls)])

    def _insist(self, number: int, call: Call, *arguments: Any) -> Any:
        """The result of a call with these arguments; a lost actor is respawned and the call retried."""

        def again() -> Call:
            self._redone += call.method == "collect"
            self._replace(number, call.method)
            return self._actors[number].remote.begin(call.method, *arguments)

        return insist(call, again, max_losses=self._max_losses)

    def _replace(self, number: int, method: str) -> None:
        """Spawn a new process for a lost actor, in the state it had before it was asked for `method`."""
        actor = self._actors[number]
        actor.remote.kill()
        self._lost_before += actor.lost_episodes  # the successor counts from 0
        actor.remote, actor.measured, actor.lost_episodes = self._spawn(number), 0, 0
        if method != "take_rows":
            actor.remote.call("take_rows", *self._share(number))
        if method == "collect":
            actor.remote.call("load_weights", self._weights)
