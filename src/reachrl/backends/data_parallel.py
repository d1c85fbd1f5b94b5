"""Several learners that train one policy: the leader runs the loop, the others follow its calls.

The leader collects. Scoring and gradients are shared out: each process scores a block of the rollout's decisions, keeps
their vision features, and computes the gradient of what each minibatch holds of its block. Gradients and figures are
summed, so that every process takes the same step, and the same as one process would.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from reachrl.algorithms.base import UpdateStats
from reachrl.backends.group import Group
from reachrl.backends.local import LocalLearner, SharedWeights
from reachrl.types import Rewards, Rollout, Scored

_END = "end"


class LeadingLearner:
    """The learner that the training loop sees; its followers do the same on their blocks.

    Args:
        learner: of this process, with the group.
        group: of more than one process, this one its leader.
    """

    def __init__(self, learner: LocalLearner, group: Group) -> None:
        self.learner, self.group = learner, group
        self.policy, self.config = learner.policy, learner.config
        self._synchronise()

    def export_weights(self) -> SharedWeights:
        """The current version of the policy."""
        return self.learner.export_weights()

    def score(self, rollout: Rollout) -> Scored:
        """Log-probs and values, each process for its block."""
        self.group.send(("score", {"rollout": rollout}))
        return self.learner.score(rollout)

    def update(
        self, rollout: Rollout, rewards: Rewards, scored: Scored, *, iteration: int, train_policy: bool
    ) -> UpdateStats:
        """One iteration of the algorithm, by all processes."""
        arguments: dict[str, Any] = {"rewards": rewards, "scored": scored}
        arguments |= {"iteration": iteration, "train_policy": train_policy}
        self.group.send(("update", arguments))  # the followers have the rollout from scoring it
        return self.learner.update(rollout, **arguments)

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state, which are everyone's."""
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        """Read them back, and give them to the followers."""
        self.learner.load(folder)
        self._synchronise()

    def close(self) -> None:
        """Let the followers end."""
        _end(self.group)

    def _synchronise(self) -> None:
        optimizer = self.learner.algorithm.optimizer
        self.group.send(("synchronise", {"optimizer": optimizer.state_dict()}))
        self.group.share(_tensors(self.learner))


def follow(learner: LocalLearner, group: Group) -> None:
    """Do what the leader does until it ends.

    Args:
        learner: of this process, with the group; its weights become the leader's.
        group: of more than one process.
    """
    rollout: Rollout | None = None
    while True:
        name, arguments = group.receive()
        if name == _END:
            group.leave()
            return
        rollout = arguments.pop("rollout", rollout)
        if name == "synchronise":
            learner.algorithm.optimizer.load_state_dict(arguments["optimizer"])
            group.share(_tensors(learner))
            continue
        assert rollout is not None
        if name == "score":
            learner.score(rollout)
        else:
            learner.update(rollout, **arguments)


def dismiss() -> None:
    """Let followers end for whom there is nothing to do."""
    _end(Group.from_environment())


def _end(group: Group) -> None:
    group.send((_END, {}))
    group.leave()


def _tensors(learner: LocalLearner) -> list[Tensor]:
    return [tensor.data for tensor in (*learner.policy.parameters(), *learner.policy.buffers())]
