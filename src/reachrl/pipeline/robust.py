"""How much success perturbations cost, before and after reinforcement learning, paired on the same episodes."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from reachrl.backends.policy_loading import limit_threads, saved_policy
from reachrl.config.loading import config_dict
from reachrl.config.train import TrainConfig
from reachrl.envs.vector import open_envs
from reachrl.evaluation import evaluate, outcome, protocol_hash, rate
from reachrl.functional.stats import paired_test
from reachrl.pipeline.base import Display, caveats
from reachrl.pipeline.conditions import Condition, Conditions
from reachrl.pipeline.measure import claim
from reachrl.report.robust_page import write_robust_page
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.atomic import replacing, write_json_atomic
from reachrl.run.file_names import file_name
from reachrl.run.fingerprint import fingerprint
from reachrl.run.lock import RunLock
from reachrl.run.metrics import MetricsLog, read_metrics
from reachrl.run.provenance import collect_provenance
from reachrl.run.stored_weights import safetensors_files
from reachrl.types import Start

Outcomes = dict[tuple[str, Start], dict[str, Any]]  # by policy and start


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """One measurement.

    `measurement.json` says of what; `episodes.jsonl` has a line for each finished episode, which a resumed measurement
    does not play again; at the end come `robust.json` and `robust.html`.
    """

    config: TrainConfig
    policies: Mapping[str, Path]
    """Saved policies by what they are called, `before` and `after`; the last is what the pictures are of."""
    conditions: Conditions
    out: Path

    @property
    def mode(self) -> str:
        """The temperature of all episodes: the first of `eval.temperatures`."""
        return self.config.eval.modes[0]

    def describe(self) -> dict[str, Any]:
        """What the outcomes depend on, JSON-ready; more axes and episodes may be asked for later."""
        return {
            "suite": self.conditions.name,
            "weights": {name: fingerprint(safetensors_files(folder)) for name, folder in self.policies.items()},
            "mode": self.mode,
            "seed": self.config.eval.seed,
            "episode": protocol_hash(
                self.config.model_copy(update={"eval": self.config.eval.model_copy(update={"num_starts": 1})})
            ),
        }


def measure_robustness(robustness: Robustness, display: Display) -> dict[str, Any]:
    """Play what is missing, then write and return the summary.

    Raises:
        ConfigError: the folder holds the episodes of another measurement.
        ReachRLError: a policy cannot be loaded, or an environment keeps failing.
    """
    out = robustness.out
    claim(out, robustness.describe())
    lock = RunLock(out / "episodes.lock")
    lock.acquire()
    try:
        _play(robustness, display)
    finally:
        lock.release()
    result = summary(robustness, played(out))
    write_json_atomic(out / "robust.json", result)
    write_robust_page(out, result)
    return result


def played(out: Path) -> Outcomes:
    """The finished episodes in a folder.

    Raises:
        StorageError: the file is damaged.
    """
    file = out / "episodes.jsonl"
    records = read_metrics(file) if file.exists() else []
    return {
        (record["policy"], Start(record["task"], "eval", record["start"], record["variant"])): record
        for record in records
    }


def _play(robustness: Robustness, display: Display) -> None:
    config, out = robustness.config, robustness.out
    done, starts = played(out), robustness.conditions.starts()
    missing = {name: [s for s in starts if (name, s) not in done] for name in robustness.policies}
    count, last = sum(map(len, missing.values())), list(robustness.policies)[-1]
    total, title = len(starts) * len(missing), robustness.conditions.name
    if not count:
        return
    limit_threads(config)
    levels = (level for axis in robustness.conditions.axes for level in axis.levels)
    shown = {starts[0], *(level.starts[0] for level in levels)}  # whose first frames are kept
    with (
        closing(MetricsLog(out / "episodes.jsonl")) as log,
        open_envs(config.env, min(config.env.num_envs, count)) as envs,
        display.stage("robust", total, title, completed=total - count) as progress,
    ):
        for name, remaining in missing.items():
            success: list[bool] = []

            def ended(episode: PlayedEpisode, name: str = name, success: list[bool] = success) -> None:
                if episode.turns:
                    _keep_frame(out, episode)
                said = {"variant": episode.start.variant, "instruction": episode.instruction}
                log.log({"kind": "episode", "policy": name} | said | outcome(episode))
                success.append(episode.success)
                progress.advance(1, policy=name, success=f"{sum(success)}/{len(success)}")

            evaluate(
                saved_policy(config, robustness.policies[name]).eval(),
                envs,
                remaining,
                mode=robustness.mode,
                config=config.eval,
                record=lambda start, name=name: name == last and start in shown,
                on_episode=ended,
            )


def _keep_frame(out: Path, episode: PlayedEpisode) -> None:
    path = out / "frames" / file_name(episode.start.variant or "plain", ".png")
    with replacing(path) as copy:
        Image.fromarray(episode.turns[0].image).save(copy, format="PNG")


def summary(robustness: Robustness, outcomes: Outcomes) -> dict[str, Any]:
    """Counts, intervals and paired tests by axis and level, JSON-ready."""
    config, conditions, names = robustness.config, robustness.conditions, list(robustness.policies)
    perturbed = [start for axis in conditions.axes for level in axis.levels for start in level.starts]
    return {
        "suite": conditions.name,
        "mode": robustness.mode,
        "policies": {name: str(folder) for name, folder in robustness.policies.items()},
        "num_tasks": len({start.task for start in perturbed}),
        "plain": figures(names, conditions.plain, outcomes),
        "perturbed": figures(names, perturbed, outcomes),
        "axes": [_axis(names, axis, outcomes) for axis in conditions.axes],
        "instructions": _instructions(names[-1], perturbed, outcomes),
        "caveats": [*caveats(config), *conditions.caveats],
        **robustness.describe(),
        "config": config_dict(config),
        "provenance": collect_provenance(seed=config.eval.seed, protocol_hash=protocol_hash(config)),
    }


def _axis(names: Sequence[str], axis: Condition, outcomes: Outcomes) -> dict[str, Any]:
    starts = [start for level in axis.levels for start in level.starts]
    levels = [
        {"label": level.label, "frame": _frame_name(level.starts), **figures(names, level.starts, outcomes)}
        for level in axis.levels
    ]
    return {"axis": axis.axis, "what": axis.what, **figures(names, starts, outcomes), "levels": levels}


def _frame_name(starts: Sequence[Start]) -> str:
    return file_name(starts[0].variant, ".png")


def figures(names: Sequence[str], starts: Sequence[Start], outcomes: Outcomes) -> dict[str, Any]:
    """Each policy's rate over some starts; the last against the first, and each against the plain episodes, paired.

    Args:
        names: of the policies.
        starts: what was played, perhaps perturbed.
        outcomes: of every episode.
    """
    found = {name: [bool(outcomes[name, start]["success"]) for start in starts] for name in names}
    plain = {name: [bool(outcomes[name, start.plain]["success"]) for start in starts] for name in names}
    rates = {name: rate(successes) for name, successes in found.items()}
    both = None if len(names) < 2 else asdict(paired_test(found[names[0]], found[names[-1]]))
    against = {name: asdict(paired_test(plain[name], found[name])) for name in names}
    return {"rates": rates, "paired_test": both, "against_plain": against}


def _instructions(name: str, starts: Sequence[Start], outcomes: Outcomes) -> list[dict[str, str]]:
    """What was said instead of the instruction, each sentence once."""
    said: dict[tuple[str, str, str], None] = {}
    for start in starts:
        plain, instead = outcomes[name, start.plain]["instruction"], outcomes[name, start]["instruction"]
        if instead != plain:
            said[start.variant.partition("#")[0], plain, instead] = None
    return [{"variant": variant, "instruction": plain, "said": instead} for variant, plain, instead in sorted(said)]
