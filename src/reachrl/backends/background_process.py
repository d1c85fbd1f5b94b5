"""The process that evaluates beside training: reads tasks from its pipe, answers with episodes."""

import os

from reachrl.backends.background import Task
from reachrl.backends.local import LocalEvaluator
from reachrl.backends.policy_loading import limit_threads, saved_policy
from reachrl.child import pipe_to_parent
from reachrl.config.backend import LocalBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.errors import ReachRLError

_NICENESS = 5  # training and its simulators come first; but it waits for each point before the next


def main() -> None:
    """Play until the parent closes the pipe."""
    pipe = pipe_to_parent()
    os.nice(_NICENESS)
    config: TrainConfig = pipe.recv()
    assert isinstance(config.backend, LocalBackendConfig)
    limit_threads(config)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        try:
            evaluator = LocalEvaluator(saved_policy(config, task.policy).eval(), config)
            episodes = evaluator.play_now(task.starts, task.mode, min(config.backend.evaluator_envs, len(task.starts)))
            answer = episodes, evaluator.take_spans()
        except ReachRLError as error:
            answer = error
        pipe.send(answer)


if __name__ == "__main__":
    main()
