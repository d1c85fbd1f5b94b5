"""Collection of demonstrations into a store: which shards exist, and the options that decide their content."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reachrl.config.base import Section
from reachrl.config.demos import DemosSection
from reachrl.config.marks import Affects, affecting
from reachrl.demos.collection import Collection, CollectProgress, shard_name
from reachrl.demos.shard import shard_metadata
from reachrl.demos.store import META_FILE, TrajectoryStore, finish_store
from reachrl.errors import ConfigError
from reachrl.registry import resolve

logger = logging.getLogger(__name__)


def collection_id(env_config: Section, config: DemosSection, seed: int) -> str:
    """A hash of everything that decides the content of a task's shard (not which tasks or how many workers)."""
    env_options = affecting(env_config, Affects.DATA)
    env_options.pop("tasks", None)  # a shard is of one
    options = affecting(config, Affects.DATA)
    text = json.dumps({"env": env_options, "demos": options, "seed": seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def collect_demos(
    env_config: Section,
    config: DemosSection,
    folder: Path,
    *,
    seed: int,
    on_progress: Callable[[CollectProgress], None] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> TrajectoryStore:
    """Collect `episodes_per_task` successful demonstrations of each task, or continue a collection cut short.

    Attempts go through the train starts 0, 1, 2, ... of each task. The content depends on the options and the seed
    only, not on the number of workers or on timing. Each task is one shard, complete or absent.

    Args:
        env_config: the environment's section (`kind`, `tasks`, ...).
        config: how much and with what noise.
        folder: the store to write.
        seed: the run's seed.
        on_progress: called after each attempt.
        check: called before the first attempt with what the environments show and take: `action_dim`, `cameras` (their
            names) and `state_size`; what it raises ends the collection.

    Raises:
        ConfigError: the expert of a task keeps failing, or `folder` holds a whole store collected with other options.
        WorkerError: a worker died, hung or raised.
        StorageError: the disk is full; shards already written are kept.
    """
    folder = Path(folder)
    tasks: tuple[str, ...] = tuple(env_config.tasks)  # pyright: ignore[reportAttributeAccessIssue]
    identity = collection_id(env_config, config, seed)
    finished = (folder / META_FILE).exists()
    missing = [task for task in tasks if not _has_shard(folder / shard_name(task), identity, finished=finished)]
    shards = [shard_name(task) for task in tasks]
    if not missing and finished:
        store = TrajectoryStore(folder)
        if [shard.name for shard in store.shards] == shards:
            return store
    if missing:
        resolve("envs", env_config.kind).prepare(env_config)  # pyright: ignore[reportAttributeAccessIssue]
        (folder / META_FILE).unlink(missing_ok=True)  # the store is incomplete until all shards stand
        Collection(env_config, config, folder, seed, identity, tasks, missing, on_progress, check).run()
    info = {"env": env_config.model_dump(mode="json"), "demos": config.model_dump(mode="json"), "seed": seed}
    return finish_store(folder, shards, info={**info, "collection_id": identity})


def _has_shard(path: Path, identity: str, *, finished: bool) -> bool:
    if not path.exists():
        return False
    found = shard_metadata(path).get("collection_id")
    if found != identity and not finished:
        logger.info("%s: of a collection with other options that was never finished; collected anew", path)
        return False
    if found != identity:
        raise ConfigError(
            f"{path}: collected with other env, demos or seed options (collection_id {found}, now {identity}). "
            "Choose another folder, or delete this one to collect again."
        )
    return True
