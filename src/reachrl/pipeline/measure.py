"""Evaluation of one saved policy on one set of start states: sharded over processes and machines, resumable."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reachrl.backends.policy_loading import limit_threads, new_policy, saved_policy
from reachrl.config.loading import config_dict
from reachrl.config.protocols import Protocol
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError
from reachrl.evaluation import against_headline, heldout_starts, outcome, outcomes_record, protocol_hash
from reachrl.pipeline.base import Display, caveats
from reachrl.pipeline.playing import play_modes
from reachrl.report.result_page import write_result_page
from reachrl.report.video import write_film
from reachrl.rollout.episodes import PlayedEpisode
from reachrl.run.atomic import storage_errors, write_json_atomic
from reachrl.run.file_names import file_name
from reachrl.run.fingerprint import fingerprint, is_of
from reachrl.run.lock import RunLock
from reachrl.run.metrics import MetricsLog, read_metrics
from reachrl.run.provenance import collect_provenance
from reachrl.run.records import AnyObject, read_record
from reachrl.run.stored_weights import safetensors_files
from reachrl.types import Start

Key = tuple[str, str, int]  # mode, task, start


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One evaluation: policy, protocol, shard and output folder.

    `measurement.json` says what; each shard appends to `episodes/<i>-of-<n>.jsonl`; the shard that ends last writes
    `result.json` and `result.html`.
    """

    config: TrainConfig
    protocol: Protocol
    policy: Path | None  # a saved policy's folder; none: the configuration's `policy.checkpoint`
    out: Path
    shard: tuple[int, int] = (1, 1)  # the i-th of n

    @property
    def weights(self) -> str:
        """The policy by name."""
        return str(self.policy or self.config.policy.checkpoint)  # pyright: ignore[reportAttributeAccessIssue]

    def keys(self) -> list[Key]:
        """Every episode, task by task: an environment of upstream's takes seconds to be made."""
        env = self.config.env
        starts = sorted(heldout_starts(env, self.config.eval), key=lambda start: env.tasks.index(start.task))
        return [(mode, start.task, start.index) for mode in self.config.eval.modes for start in starts]

    def describe(self) -> dict[str, Any]:
        """What the outcomes depend on, JSON-ready."""
        folder = Path(self.weights)
        return {
            "protocol": self.protocol,
            "policy": self.weights,
            "weights": fingerprint(safetensors_files(folder)) if folder.is_dir() else None,
            "modes": list(self.config.eval.modes),
            "protocol_hash": protocol_hash(self.config),
        }


def measure(measurement: Measurement, display: Display) -> dict[str, Any] | None:
    """Play this shard's remaining episodes; return the merged result once every shard has finished.

    Raises:
        ConfigError: the folder holds another policy's or another protocol's episodes.
        ReachRLError: the policy cannot be loaded, or an environment keeps failing.
    """
    out, (shard, of) = measurement.out, measurement.shard
    claim(out, _asked(measurement))
    file = out / "episodes" / f"{shard}-of-{of}.jsonl"
    done = played(out)
    mine = [key for key in measurement.keys()[shard - 1 :: of] if key not in done]
    with storage_errors(file):
        file.parent.mkdir(exist_ok=True)
    lock = RunLock(file.with_suffix(".lock"))
    lock.acquire()
    try:
        if mine:
            with closing(MetricsLog(file)) as log:
                _play(measurement, mine, log, display)
    finally:
        lock.release()
    return merge(measurement)


def played(out: Path) -> dict[Key, dict[str, Any]]:
    """The outcomes in all files of `out`, by (mode, task, start).

    Raises:
        StorageError: a file is damaged.
    """
    records = [record for file in sorted((out / "episodes").glob("*.jsonl")) for record in read_metrics(file)]
    return {(record["mode"], record["task"], record["start"]): record for record in records}


def merge(measurement: Measurement) -> dict[str, Any] | None:
    """Write the result of all shards and return it; none while episodes are missing."""
    found, keys = played(measurement.out), measurement.keys()
    if any(key not in found for key in keys):
        return None
    config = measurement.config
    fields = ("task", "start", "success", "num_steps", "num_decisions", "num_malformed")
    modes = {
        mode: outcomes_record([{field: found[key][field] for field in fields} for key in keys if key[0] == mode])
        for mode in config.eval.modes
    }
    result = {
        **measurement.describe(),
        "caveats": list(caveats(config)),
        "modes": modes,
        "against_headline": against_headline(modes),
        "config": config_dict(config),
        "provenance": collect_provenance(seed=config.eval.seed, protocol_hash=protocol_hash(config)),
    }
    write_json_atomic(measurement.out / "result.json", result)
    write_result_page(measurement.out, result)
    return result


def claim(out: Path, asked: dict[str, Any]) -> None:
    """Write `measurement.json` into a new folder, or check that an existing one describes the same evaluation.

    Args:
        out: the folder.
        asked: what the outcomes depend on; `policy` is a name and may differ.

    Raises:
        ConfigError: it holds episodes of another one, or is a file.
    """
    file = out / "measurement.json"
    with storage_errors(out):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out} is a file; expected a folder, or a name that does not exist yet")
        out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json_atomic(file, asked)
        return
    there = read_record(file, AnyObject, remedy="choose another --out")
    differing = [key for key in asked if key != "policy" and there.get(key) != asked[key]]
    if differing:
        lines = [f"  {key}: {there.get(key)} there, {asked[key]} asked for" for key in differing]
        raise ConfigError("\n".join([f"{out} holds episodes of another evaluation:", *lines, "Choose another --out."]))


def _asked(measurement: Measurement) -> dict[str, Any]:
    """What is asked for; weights as an earlier version wrote them where they are the same."""
    asked, file = measurement.describe(), measurement.out / "measurement.json"
    with storage_errors(measurement.out):
        begun = file.is_file()
    if asked["weights"] and begun:
        known = read_record(file, AnyObject, remedy="choose another --out").get("weights")
        if known and is_of(known, safetensors_files(Path(measurement.weights))):
            asked["weights"] = known
    return asked


def _play(measurement: Measurement, keys: Sequence[Key], log: MetricsLog, display: Display) -> None:
    config, (shard, of) = measurement.config, measurement.shard
    limit_threads(config)
    policy = new_policy(config) if measurement.policy is None else saved_policy(config, measurement.policy)
    starts = {
        mode: [Start(task, "eval", index) for kept, task, index in keys if kept == mode] for mode in config.eval.modes
    }

    def keep(mode: str, episode: PlayedEpisode) -> None:
        if episode.turns:  # before the outcome, which says that nothing of this episode is left to do
            _film(measurement.out / "videos", episode)
        log.log({"kind": "episode", "mode": mode} | outcome(episode))

    title = measurement.protocol if of == 1 else f"shard {shard} of {of}"
    play_modes(config, policy, starts, display, title, on_episode=keep)


def _film(folder: Path, episode: PlayedEpisode) -> None:
    path = folder / file_name(episode.start.task, ".mp4")
    write_film(path, episode.frames(), instruction=episode.instruction, success=episode.success, fps=20)
