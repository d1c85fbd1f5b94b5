"""The evaluator, as it runs inside a Ray actor."""

from collections.abc import Sequence
from pathlib import Path

from reachrl.backends.cluster.transfer import fetched
from reachrl.backends.local import LocalEvaluator
from reachrl.backends.policy_loading import limit_threads, saved_policy
from reachrl.backends.weights import PackedWeights, load_packed
from reachrl.config.backend import RayBackendConfig
from reachrl.config.train import TrainConfig
from reachrl.policies.base import Policy
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.spans import Span
from reachrl.types import Start


class EvaluatorProcess:
    """Plays held-out episodes with a copy of the policy.

    Args:
        config: the run's.
        warm: folder of the policy that the run began from; trained weights are sent on top of it.
    """

    def __init__(self, config: TrainConfig, warm: Path) -> None:
        self._config, self._warm = config, warm
        self._policy: Policy | None = None

    def play(self, weights: PackedWeights, starts: Sequence[Start], mode: str) -> tuple[list[PlayedEpisode], Span]:
        """Play every start once with weights whose buckets lie in the object store."""
        config = self._config
        assert isinstance(config.backend, RayBackendConfig)
        if self._policy is None:
            limit_threads(config)
            self._policy = saved_policy(config, self._warm).eval()
        load_packed(self._policy, fetched(weights), train_vision=config.algorithm.train_vision)
        evaluator = LocalEvaluator(self._policy, config)
        episodes = evaluator.play_now(starts, mode, min(config.backend.evaluator_envs, len(starts)))
        return episodes, evaluator.take_spans()[0]
