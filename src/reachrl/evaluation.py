"""Success rates on held-out start states, with counts, intervals and the protocol they belong to."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from reachrl.config.env import EnvSection
from reachrl.config.evaluation import EvalSection, mode_temperature
from reachrl.config.marks import Affects, affecting
from reachrl.config.train import TrainConfig
from reachrl.envs.batch import EnvBatch
from reachrl.functional.stats import PairedTest, paired_test, wilson
from reachrl.policies.base import Policy
from reachrl.rollout.episodes import PlayedEpisode, player_at
from reachrl.types import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Every episode of one evaluation at one temperature."""

    mode: str
    """The temperature by name, see `reachrl.config.evaluation.mode_name`."""
    episodes: tuple[PlayedEpisode, ...]

    def record(self) -> dict[str, Any]:
        """Counts, Wilson intervals and episodes as JSON-ready values."""
        return outcomes_record([outcome(episode) for episode in self.episodes])


def outcome(episode: PlayedEpisode) -> dict[str, Any]:
    """What a record keeps of an episode."""
    counts = {name: getattr(episode, name) for name in ("num_steps", "num_decisions", "num_malformed")}
    return {"task": episode.start.task, "start": episode.start.index, "success": episode.success} | counts


def outcomes_record(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts and Wilson intervals, of all and per task, with the outcomes themselves: JSON-ready."""
    tasks = dict.fromkeys(found["task"] for found in outcomes)
    per_task = {task: rate([found["success"] for found in outcomes if found["task"] == task]) for task in tasks}
    decisions = sum(found["num_decisions"] for found in outcomes)
    malformed = sum(found["num_malformed"] for found in outcomes) / decisions if decisions else None
    return rate([found["success"] for found in outcomes]) | {
        "malformed_rate": malformed,
        "per_task": per_task,
        "episodes": list(outcomes),
    }


def rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    """`k`, `n`, `rate` and the Wilson 95 % interval of a list of outcomes."""
    k, n = sum(outcomes), len(outcomes)
    return {"k": k, "n": n, "rate": k / n if n else 0.0, "wilson95": list(wilson(k, n))}


def heldout_starts(env: EnvSection, config: EvalSection) -> list[Start]:
    """The first `num_starts` evaluation starts of each task, tasks interleaved to balance the load: the test."""
    return [Start(task, "eval", index) for index in range(config.num_starts) for task in env.tasks]


def validation_starts(env: EnvSection, config: EvalSection) -> list[Start]:
    """The first `during_starts` validation starts of each task: played during training, never in the test."""
    return [Start(task, "validation", index) for index in range(config.during_starts) for task in env.tasks]


def evaluate(
    policy: Policy,
    envs: EnvBatch,
    starts: Sequence[Start],
    *,
    mode: str,
    config: EvalSection,
    record: Callable[[Start], bool] = lambda _: False,
    on_episode: Callable[[PlayedEpisode], None] | None = None,
) -> EvalResult:
    """Play each start once; outcomes depend neither on the number of environments nor on their order.

    Args:
        policy: what acts.
        envs: where.
        starts: what is played.
        mode: the temperature by name.
        config: for the seed of the noise, which is the same at every temperature.
        record: whether to keep an episode's turns.
        on_episode: called as each ends.
    """
    player = player_at(mode_temperature(mode), policy, envs, seed=config.seed)
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


def against_headline(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The paired test of every other temperature against the first of `records`, by name and JSON-ready.

    `improved` counts the starts where the headline fails and the other temperature succeeds.
    """
    first, *others = records
    return {mode: asdict(compare(records[first], records[mode])) for mode in others}


def protocol_hash(config: TrainConfig) -> str:
    """Twelve hex digits shared only by success rates that may be compared.

    Covers the keys of `env` and `eval` that are marked `Affects.PROTOCOL`, and simulator versions. The temperature is
    named with each rate; what earlier versions measured at temperature 1 keeps its hash.
    """
    decisive = {name: affecting(getattr(config, name), Affects.PROTOCOL) for name in ("env", "eval")}
    decisive["eval"] |= {"temperature": 1.0}
    protocol = {**decisive, "versions": {name: _version(name) for name in config.env.packages}}
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
