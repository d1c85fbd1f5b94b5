"""The actors of one process: one policy, environments in processes of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from reachrl.backends.background import BackgroundEvaluator
from reachrl.backends.base import Backend, Pending, SharedWeights, Weights, Workers
from reachrl.backends.data_parallel import follow
from reachrl.backends.group import Group
from reachrl.backends.learner import new_learner
from reachrl.backends.policy_loading import new_policy, warm_policy
from reachrl.backends.shares import even_shares
from reachrl.backends.weights import PackedWeights, actor_gap, load_packed
from reachrl.config.algorithm import Needs
from reachrl.config.backend import LocalBackendConfig
from reachrl.config.env import EnvSection
from reachrl.config.evaluation import mode_temperature
from reachrl.config.train import TrainConfig
from reachrl.envs.batch import EnvBatch
from reachrl.envs.vector import open_envs
from reachrl.errors import ConfigError
from reachrl.policies.base import Policy
from reachrl.rollout.collector import Assign, Collector, Vary, collect_in_turn
from reachrl.rollout.episodes import PlayedEpisode, check_validation, player_at
from reachrl.rollout.join import join_rollouts
from reachrl.run.spans import Span, SpanLog
from reachrl.types import Rollout, Start


class LocalActors:
    """One policy, its environments in one group or several that take turns.

    Args:
        policy: what acts: the learner's own object, or a copy of it.
        groups: environments; while the simulators of one group step, the actions of another are decoded.
        seed: of the sampling noise.
        temperature: of the sampling distribution.
        train_vision: whether the towers travel too, where the policy is a copy.
        first: number of the first environment among all.
        total: number of all environments, of other actors too; none: these are all.
        name: in the timeline.
        needs: of the algorithm.
        max_steps: decisions of the longest episode.
        vary: perturbs episodes.
        keep_inputs: rollouts hold what was decided on, with cached features, for a learner with the same policy.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[EnvBatch],
        *,
        seed: int,
        temperature: float,
        train_vision: bool = False,
        first: int = 0,
        total: int | None = None,
        name: str = "actor",
        needs: Needs | None = None,
        max_steps: int = 1,
        vary: Vary = lambda start, seed, number: start,
        keep_inputs: bool = False,
    ) -> None:
        self.policy, self.groups = policy, list(groups)
        self._seed, self._temperature, self._train_vision = seed, temperature, train_vision
        self._log = SpanLog(name)
        total = sum(envs.num_envs for envs in groups) if total is None else total
        self.collectors: list[Collector] = []
        for envs in groups:
            collector = Collector(
                policy,
                envs,
                seed=seed,
                temperature=temperature,
                first=first,
                total=total,
                log=self._log,
                needs=needs,
                max_steps=max_steps,
                vary=vary,
                keep_inputs=keep_inputs,
            )
            self.collectors.append(collector)
            first += envs.num_envs
        self._version = -1
        self._gap: float | None = None  # between the learner's log-probs and ours; None: it is the same policy
        self._lost_before = 0  # by the processes that this one continues

    def load_weights(self, weights: Weights) -> int:
        """Note the version of weights that are already here, or copy and check those that were sent.

        Raises:
            WorkerError: what was sent is damaged, of another policy, or does not act as it was trained.
        """
        if isinstance(weights, PackedWeights):
            load_packed(self.policy, weights, train_vision=self._train_vision)
            self._gap = actor_gap(
                self.policy,
                weights,
                seed=self._seed,
                shown=self.groups[0].shown,
                temperature=self._temperature,
            )
        else:
            shared = isinstance(weights, SharedWeights) and weights.policy is self.policy
            assert shared, "local actors share the learner's policy"
        self._version = weights.version
        return self._version

    def collect(self, assign: Assign, num_steps: int) -> Pending[Rollout]:
        """`num_steps` decisions in every environment, now."""
        turns = [each.collecting(assign, num_steps, policy_version=self._version) for each in self.collectors]
        return Pending.done(join_rollouts(collect_in_turn(turns)))

    @property
    def lost_episodes(self) -> int:
        """Episodes lost with a dead or stuck simulator since the run began."""
        return self._lost_before + sum(envs.lost_episodes for envs in self.groups)

    def metrics(self) -> dict[str, float]:
        """Lost episodes, and how far a copy's log-probs are from the learner's."""
        gap = {} if self._gap is None else {"weight_sync/gap": self._gap}
        return {"lost_episodes": self.lost_episodes} | gap

    def take_spans(self) -> list[Span]:
        """When was decoded and when simulated."""
        return self._log.take()

    def balance(self) -> list[dict[str, Any]]:
        """Empty: there is one actor."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, and how many were lost so far."""
        rows = [row for collector in self.collectors for row in collector.state()]
        return {"lost_episodes": self.lost_episodes, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replay the running episodes."""
        self._lost_before = state["lost_episodes"]
        rows = list(state["rows"])
        for collector in self.collectors:
            count = collector.envs.num_envs
            collector.load_state(rows[:count])
            rows = rows[count:]

    def close(self) -> None:
        """Stop the environment processes."""
        for envs in self.groups:
            envs.close()


class LocalEvaluator:
    """Evaluates with the actors' own policy, while training waits, in environments of its own.

    Args:
        policy: holds the weights that the actors have loaded.
        config: the run's.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self._policy, self._config = policy, config
        self._log = SpanLog("evaluator")
        self._checked = False

    def play(self, weights: Weights, starts: Sequence[Start], mode: str) -> Pending[list[PlayedEpisode]]:
        """Play every start once, now."""
        return Pending.done(self.play_now(starts, mode, self._config.env.num_envs))

    def play_now(self, starts: Sequence[Start], mode: str, num_envs: int) -> list[PlayedEpisode]:
        """Play every start once in so many environments.

        Raises:
            ExtensionError: the environment has no validation starts of its own.
        """
        options = self._config.eval
        with self._log.span("play"), open_envs(self._config.env, num_envs) as envs:
            if not self._checked:
                check_validation(envs)
                self._checked = True
            return player_at(mode_temperature(mode), self._policy, envs, seed=options.seed).play(starts)

    def take_spans(self) -> list[Span]:
        """The evaluator's spans."""
        return self._log.take()


def open_groups(config: EnvSection, num_envs: int, num_groups: int) -> list[EnvBatch]:
    """`num_envs` environments in groups whose sizes differ by one at most.

    Raises:
        ConfigError: more groups than environments.
        ReachRLError: an environment cannot be made.
    """
    if num_groups > num_envs:
        raise ConfigError(
            f"backend.env_groups={num_groups} groups need as many environments in each actor, which has {num_envs}: "
            "lower it, or raise env.num_envs"
        )
    groups: list[EnvBatch] = []
    try:
        for size in even_shares(num_envs, num_groups):
            groups.append(open_envs(config, size))
    except BaseException:
        for group in groups:
            group.close()
        raise
    return groups


class LocalBackend(Backend):
    """One process that acts and learns with one policy; under `torchrun` one of several learners, the one actor."""

    Config: ClassVar[type[LocalBackendConfig]] = LocalBackendConfig

    @contextmanager
    def open(self, config: TrainConfig, warm: Path) -> Iterator[Workers]:
        """Make policy, learner and environments in this process."""
        group = Group.from_environment(sharded=self.config.sharding == "full")
        policy = warm_policy(config, warm)
        # Of a split policy the learner keeps a part; acting and saving need all of it.
        whole = warm_policy(config, warm) if group.sharded else None
        learner = new_learner(config, policy, group, whole)
        actors = LocalActors(
            whole or policy,
            open_groups(config.env, config.env.num_envs, self.config.env_groups),
            seed=config.seed,
            temperature=config.rollout.temperature,
            train_vision=config.algorithm.train_vision,
            needs=config.algorithm.needs,
            max_steps=config.env.max_steps,
            vary=config.env.varied,
            # One rollout's features at a time: the learner's own would take the same memory.
            keep_inputs=group.alone and not (config.algorithm.train_vision or config.collect_ahead),
        )
        background = None
        if config.eval.during_every and self.config.evaluator_envs:
            background = BackgroundEvaluator(config)
        try:
            learner.lead(actors.groups[0].shown)
            yield Workers(
                actors=actors, learner=learner, evaluator=background or LocalEvaluator(whole or policy, config)
            )
        finally:
            if background is not None:
                background.close()
            actors.close()
        learner.close()

    def follow(self, config: TrainConfig) -> None:
        """Share the learner's work with the process that `torchrun` numbers 0, until its training ends."""
        group = Group.from_environment(sharded=self.config.sharding == "full")
        follow(new_learner(config, new_policy(config).eval(), group), group)
