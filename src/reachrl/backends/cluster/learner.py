"""All learner processes behind the `Learner` interface of the training loop: rank 0 leads, the others follow."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from reachrl.backends.base import Pending
from reachrl.backends.cluster.calls import Call, Lost, Remote
from reachrl.backends.weights import PackedWeights
from reachrl.envs.base import Shown
from reachrl.errors import LearnerLostError
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Rewards, Rollout, Scored

_LEAVE_S = 10.0  # for a polite end; then they are killed


class ClusterLearner:
    """Learner processes: one leader and its followers.

    They hold parts of one state, so none can be replaced alone: a loss ends them all, and the run restarts from its
    last checkpoint with new processes.

    Args:
        processes: the leader first.
        shown: asks the actors what their environments show.

    Raises:
        LearnerLostError: here and in every method: a process died or hung.
    """

    def __init__(self, processes: Sequence[Remote], shown: Callable[[], Shown]) -> None:
        self.version, self._shown = 0, shown
        self._leader, *self._others = processes
        self._following: list[Call] = []
        self._log = SpanLog("learner")
        self._offered = 0  # rollouts
        self._gone = False
        address = self._ask("address")
        self._following = [other.begin("follow", address) for other in self._others]
        self._ask("lead", address)

    def export_weights(self) -> PackedWeights:
        """The current version, its buckets in the object store."""
        return self._ask("pack_weights", self._shown())

    def score(self, rollout: Rollout) -> Pending[Scored]:
        """Begin to compute log-probs and values of a rollout."""
        self._offered += 1
        stored = ray.put(rollout)
        offers = [each.begin("offer", self._offered, stored) for each in (self._leader, *self._others)]
        for offer in offers:
            self._wait(offer)
        return Pending(partial(self._wait, self._leader.begin("score", self._offered)))

    def update(self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int) -> dict[str, float]:
        """One iteration of the algorithm on the rollout that was scored last."""
        stats, spans = self._ask("update", rewards, scored, iteration)
        self.version += 1
        self._log.extend(spans)
        return stats

    def take_spans(self) -> list[Span]:
        """The leader's scoring and update spans."""
        return self._log.take()

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state."""
        self._ask("save", folder.absolute())

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone."""
        self._ask("save_policy", folder.absolute())

    def load(self, folder: Path, *, version: int) -> None:
        """Read weights and optimiser state."""
        self._ask("load", folder.absolute(), version)
        self.version = version

    def close(self) -> None:
        """End the processes, in order where they still respond."""
        if self._gone:
            return
        closing = self._leader.begin("close")
        with contextlib.suppress(Exception):  # whatever state they are in, they are ended below
            ray.wait([closing.reference], timeout=_LEAVE_S)
            ray.wait([call.reference for call in self._following], num_returns=len(self._following), timeout=_LEAVE_S)
        self.kill()

    def kill(self) -> None:
        """End the processes now."""
        self._gone = True
        for each in (self._leader, *self._others):
            each.kill()

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._wait(self._leader.begin(method, *arguments))

    def _wait(self, call: Call) -> Any:
        try:
            return call.result(concurrent=self._following)
        except Lost as lost:
            self.kill()
            raise LearnerLostError(f"{lost}; the last checkpoint is whole") from lost
