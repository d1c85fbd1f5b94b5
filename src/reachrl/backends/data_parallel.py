"""Several learners that train one policy: the leader runs the loop, the others follow its calls.

Scoring and gradients are data-parallel: each process scores a block of the rollout's decisions, caches their vision
features, and computes the gradients of its block's rows of each minibatch. Gradients and statistics are summed, so
every process takes the same step, equal to that of one process. Weights are replicated or, in a sharded group, split.
"""

from collections.abc import Callable

from reachrl.backends.group import Group
from reachrl.backends.learner import LocalLearner
from reachrl.types import Rollout


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
        if name == Group.END:
            group.leave()
            return
        if name == "score_now":
            sent = arguments["rollout"]
            rollout = arguments["rollout"] = take(sent) if take is not None and isinstance(sent, int) else sent
        elif name == "update":
            arguments["rollout"], rollout = rollout, None
        getattr(learner, name)(**arguments)
        learner.take_spans()  # the leader's tell enough
