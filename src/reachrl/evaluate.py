"""Success rates on held-out start states, with counts, intervals and the protocol they belong to."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from reachrl.config.env import EnvSection
from reachrl.config.train import EvalSection, TrainConfig
from reachrl.envs.vector import VectorEnv
from reachrl.functional.stats import PairedTest, paired_test, wilson
from reachrl.policies.base import Policy
from reachrl.rollout.episodes import EpisodePlayer, Mode, PlayedEpisode
from reachrl.types import Start

# Options of an environment that change the speed or the training, never an evaluated outcome.
NOT_PROTOCOL = {"num_envs", "worker_timeout_s", "num_train_starts", "num_eval_starts", "assets", "render_device"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Every episode of one evaluation in one mode."""

    mode: Mode
    episodes: tuple[PlayedEpisode, ...]

    def record(self) -> dict[str, Any]:
        """Counts, Wilson intervals and episodes as JSON-ready values."""
        return outcomes_record([outcome(episode) for episode in self.episodes])


def outcome(episode: PlayedEpisode) -> dict[str, Any]:
    """What a record keeps of an episode."""
    start = episode.start
    return {"task": start.task, "start": start.index, "success": episode.success, "num_steps": episode.num_steps}


def outcomes_record(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts and Wilson intervals, of all and per task, with the outcomes themselves: JSON-ready."""
    tasks = dict.fromkeys(found["task"] for found in outcomes)
    per_task = {task: rate([found["success"] for found in outcomes if found["task"] == task]) for task in tasks}
    return rate([found["success"] for found in outcomes]) | {"per_task": per_task, "episodes": list(outcomes)}


def rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    """`k`, `n`, `rate` and the Wilson 95 % interval of a list of outcomes."""
    k, n = sum(outcomes), len(outcomes)
    return {"k": k, "n": n, "rate": k / n if n else 0.0, "wilson95": list(wilson(k, n))}


def heldout_starts(env: EnvSection, config: EvalSection) -> list[Start]:
    """The first `num_starts` evaluation starts of each task, tasks interleaved to balance the load."""
    return [Start(task, "eval", index) for index in range(config.num_starts) for task in env.tasks]


def evaluate(
    policy: Policy,
    envs: VectorEnv,
    starts: Sequence[Start],
    *,
    mode: Mode,
    config: EvalSection,
    record: Callable[[Start], bool] = lambda _: False,
    on_episode: Callable[[PlayedEpisode], None] | None = None,
) -> EvalResult:
    """Play each start once; outcomes depend neither on the number of environments nor on their order."""
    player = EpisodePlayer(policy, envs, mode=mode, temperature=config.temperature, seed=config.seed)
    return EvalResult(mode=mode, episodes=tuple(player.play(starts, record=record, on_episode=on_episode)))


def compare(before: dict[str, Any], after: dict[str, Any]) -> PairedTest:
    """Exact McNemar test of two evaluation records over the same (task, start).

    Raises:
        ValueError: the records do not cover the same start states.
    """

    def outcomes(record: dict[str, Any]) -> dict[tuple[str, int], bool]:
        return {(e["task"], e["start"]): e["success"] for e in record["episodes"]}

    first, second = outcomes(before), outcomes(after)
    if first.keys() != second.keys():
        raise ValueError("a paired test needs evaluations of the same start states")
    return paired_test([first[key] for key in first], [second[key] for key in first])


def protocol_hash(config: TrainConfig) -> str:
    """Twelve hex digits shared only by success rates that may be compared.

    Covers the environment's options that decide an episode, tasks and start states, temperature, seed and
    simulator versions.
    """
    env = {key: value for key, value in config.env.model_dump(mode="json").items() if key not in NOT_PROTOCOL}
    evaluation = config.eval.model_dump(mode="json", include={"num_starts", "temperature", "seed"})
    protocol = {"env": env, "eval": evaluation, "versions": {name: _version(name) for name in config.env.packages}}
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
