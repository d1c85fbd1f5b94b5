"""Several learners that train one policy: the leader runs the loop, the others follow its calls.

Scoring and gradients are data-parallel: each process scores a block of the rollout's decisions, caches their vision
features, and computes the gradients of its block's rows of each minibatch. Gradients and statistics are summed, so
every process takes the same step, equal to that of one process. Weights are replicated or, in a sharded group, split.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reachrl.algorithms.base import Stats
from reachrl.backends.base import Done, Pending, SharedWeights
from reachrl.backends.group import Group
from reachrl.backends.learner import LocalLearner
from reachrl.backends.weights import PackedWeights
from reachrl.envs.base import Shown
from reachrl.run.spans import Span
from reachrl.types import Rewards, Rollout, Scored

_END = "end"


class LeadingLearner:
    """The learner of rank 0: each call is broadcast to the followers, which repeat it on their blocks.

    Args:
        learner: of this process, with the group.
        group: of more than one process, this one its leader.
        shown: what the environments show, for weights that are sent by `export_weights`.
    """

    def __init__(self, learner: LocalLearner, group: Group, *, shown: Shown | None = None) -> None:
        self.learner, self.group, self.shown = learner, group, shown
        self._together("share")

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.learner.version

    def export_weights(self) -> SharedWeights | PackedWeights:
        """The policy of this process or, in a sharded group, the gathered weights, packed."""
        if not self.group.sharded:
            return self.learner.export_weights()
        assert self.shown is not None
        return self.pack_weights(shown=self.shown)

    def pack_weights(self, *, shown: Shown) -> PackedWeights:
        """The current version to be sent."""
        return self._collective("pack_weights", shown=shown)

    def score(self, rollout: Rollout, *, number: int | None = None) -> Pending[Scored]:
        """Log-probs and values, each process for its block.

        Args:
            rollout: what was collected.
            number: under which the followers were offered the rollout; None sends it to them.
        """
        self.group.send(("score_now", {"rollout": rollout if number is None else number}))
        return Done(self.learner.score_now(rollout))

    def update(self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int) -> Stats:
        """One iteration of the algorithm, by all processes; the followers have the rollout from scoring it."""
        arguments: dict[str, Any] = {"rewards": rewards, "scored": scored, "iteration": iteration}
        self.group.send(("update", arguments))
        return self.learner.update(rollout, **arguments)

    def take_spans(self) -> list[Span]:
        """When the leader scored and updated; the followers do so at the same time."""
        return self.learner.take_spans()

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state."""
        self._collective("save", folder=folder)

    def save_policy(self, folder: Path) -> None:
        """Write the policy alone."""
        self._collective("save_policy", folder=folder)

    def load(self, folder: Path, *, version: int) -> None:
        """Read them back, and give them to the followers."""
        self.learner.load(folder, version=version)
        self._together("share")

    def hand_over(self) -> None:
        """Release the accelerators' memory for the actors there."""
        self._together("hand_over")

    def close(self) -> None:
        """End the followers."""
        _end(self.group)

    def _collective(self, name: str, **arguments: Any) -> Any:
        """Run `name` on the leader, and on all processes where weights are sharded."""
        if self.group.sharded:
            return self._together(name, **arguments)
        return getattr(self.learner, name)(**arguments)

    def _together(self, name: str, **arguments: Any) -> Any:
        self.group.send((name, arguments))
        return getattr(self.learner, name)(**arguments)


def follow(learner: LocalLearner, group: Group, take: Callable[[int], Rollout] | None = None) -> None:
    """Repeat the leader's calls until it ends.

    Args:
        learner: of this process, with the group; its weights become the leader's.
        group: of more than one process.
        take: returns a rollout that was offered to this process, where the leader names it by number.
    """
    rollout: Rollout | None = None
    while True:
        name, arguments = group.receive()
        if name == _END:
            group.leave()
            return
        if name == "score_now":
            sent = arguments["rollout"]
            rollout = arguments["rollout"] = take(sent) if take is not None and isinstance(sent, int) else sent
        elif name == "update":
            arguments["rollout"], rollout = rollout, None
        getattr(learner, name)(**arguments)
        learner.take_spans()  # the leader's tell enough


def dismiss() -> None:
    """End followers that have nothing to do."""
    _end(Group.from_environment())


def _end(group: Group) -> None:
    group.send((_END, {}))
    group.leave()
