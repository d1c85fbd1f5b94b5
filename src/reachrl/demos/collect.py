"""Collecting demonstrations: scripted experts in parallel processes, with a result that does not depend on them."""

import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import pyarrow as pa

from reachrl.config.base import Section
from reachrl.config.demos import DemosSection
from reachrl.config.marks import Affects, affecting
from reachrl.demos.expert import Attempt, WorkerFailure, WorkerReady, WorkerSetup
from reachrl.demos.process import ExpertProcess
from reachrl.demos.shard import ShardWriter, shard_metadata
from reachrl.demos.store import META_FILE, TrajectoryStore, finish_store
from reachrl.errors import ConfigError, WorkerError
from reachrl.registry import resolve, send
from reachrl.run.cores import available_cores
from reachrl.run.file_names import file_name

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # building the first simulator may compile or decimate meshes, on a core of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectProgress:
    """How far the collection is, after each attempt."""

    task: str
    kept: int  # successes of this task so far
    attempts: int  # attempts at this task so far
    total_kept: int  # successes of all tasks, those found on disk included
    total: int  # successes wanted


@dataclass(slots=True)
class _Task:
    """The attempts at one task, handed out in order and never more than could still be needed.

    An attempt is only handed out while successes and running attempts together are fewer than wanted, so the kept
    set is always the successes with the lowest numbers, whoever finished first.
    """

    name: str
    wanted: int
    max_attempts: int
    next_number: int = 0
    running: int = 0
    failures: int = 0
    tables: dict[int, pa.Table] = field(default_factory=dict)

    @property
    def wants_attempt(self) -> bool:
        return len(self.tables) + self.running < self.wanted and self.next_number < self.max_attempts

    @property
    def complete(self) -> bool:
        return len(self.tables) == self.wanted

    @property
    def hopeless(self) -> bool:
        return not self.complete and self.running == 0 and self.next_number >= self.max_attempts


def collection_id(env_config: Section, config: DemosSection, seed: int) -> str:
    """A hash of everything that decides the content of a task's shard (not which tasks or how many workers)."""
    env_options = affecting(env_config, Affects.DATA)
    env_options.pop("tasks", None)  # a shard is of one
    options = affecting(config, Affects.DATA)
    text = json.dumps({"env": env_options, "demos": options, "seed": seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_name(task: str) -> str:
    """The file that holds the demonstrations of `task`."""
    return file_name(task, ".parquet")


def collect_demos(
    env_config: Section,
    config: DemosSection,
    folder: Path,
    *,
    seed: int,
    on_progress: Callable[[CollectProgress], None] | None = None,
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
        _Collection(env_config, config, folder, seed, identity, tasks, missing, on_progress).run()
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


class _Collection:
    """The parent's side: hands attempts to workers, keeps what succeeds, writes a shard when a task is complete."""

    def __init__(
        self,
        env_config: Section,
        config: DemosSection,
        folder: Path,
        seed: int,
        identity: str,
        tasks: Sequence[str],
        missing: Sequence[str],
        on_progress: Callable[[CollectProgress], None] | None,
    ) -> None:
        self.env_config, self.config, self.folder, self.seed = env_config, config, folder, seed
        self.identity, self.on_progress = identity, on_progress
        wanted = config.episodes_per_task
        max_attempts = math.ceil(config.max_attempts_factor * wanted)
        self.tasks = {task: _Task(task, wanted, max_attempts) for task in missing}
        self.total = wanted * len(tasks)
        self.kept = wanted * (len(tasks) - len(missing))
        self.timeout_s = float(getattr(env_config, "worker_timeout_s", 60.0))
        self.num_starts: int | None = None
        self.workers: list[ExpertProcess] = []

    def run(self) -> None:
        """Collect all missing tasks; workers are stopped whatever happens."""
        cores = available_cores()
        count = min(self.config.workers or cores, self.config.episodes_per_task * len(self.tasks))
        kind: str = self.env_config.kind  # pyright: ignore[reportAttributeAccessIssue]
        setup = WorkerSetup(
            kind=kind,
            code=send("envs", kind),
            env=self.env_config.model_dump(mode="json"),
            demos=self.config.model_dump(mode="json"),
            seed=self.seed,
        )
        limit_s = max(START_TIMEOUT_S, self.timeout_s) * max(1.0, count / cores)
        try:
            env = resolve("envs", kind)
            for number in range(count):
                variables = env.worker_variables(self.env_config, number)
                self.workers.append(ExpertProcess(setup, variables, deadline=time.monotonic() + limit_s))
            while self.tasks:
                self._poll()
        finally:
            for worker in self.workers:
                worker.stop()

    def _poll(self) -> None:
        """Wait for messages, or for the first deadline."""
        first = min(worker.deadline for worker in self.workers)
        for pipe in wait([worker.pipe for worker in self.workers], timeout=max(0.0, first - time.monotonic())):
            worker = next(worker for worker in self.workers if worker.pipe is pipe)
            try:
                self._receive(worker, worker.pipe.recv())
            except (EOFError, ConnectionResetError) as error:
                raise self._worker_error(worker, worker.epitaph()) from error
        now = time.monotonic()
        for worker in self.workers:
            if worker.deadline < now and not worker.pipe.poll():
                raise self._worker_error(worker, self._silence(worker))

    def _silence(self, worker: ExpertProcess) -> str:
        if worker.ready:
            return f"hangs: it has been silent for {self.timeout_s:g} s (env.worker_timeout_s)"
        least = max(START_TIMEOUT_S, self.timeout_s)
        return f"is not ready in time; set env.worker_timeout_s above {least:g} to wait longer, or lower demos.workers"

    def _receive(self, worker: ExpertProcess, message: object) -> None:
        worker.deadline = time.monotonic() + self.timeout_s
        if isinstance(message, WorkerFailure):
            if message.error is not None:
                raise message.error
            raise self._worker_error(worker, f"raised an exception:\n{message.text}")
        if isinstance(message, WorkerReady):
            self._check(message)
            worker.ready = True
            self._assign_all()
        elif isinstance(message, int):
            worker.step = message
        elif isinstance(message, tuple):
            attempt, worker.attempt = worker.attempt, None
            assert attempt is not None
            self._finished(attempt, message[1])
            self._assign_all()

    def _check(self, ready: WorkerReady) -> None:
        if unknown := [task for task in self.tasks if task not in ready.tasks]:
            raise ConfigError(f"env.tasks: unknown task {unknown[0]!r}; the environment has {', '.join(ready.tasks)}.")
        self.num_starts = ready.num_starts
        if self.config.action_noise == 0 or self.config.noise_probability == 0:
            for task in self.tasks.values():  # without noise a second round would repeat the first
                task.max_attempts = min(task.max_attempts, ready.num_starts)

    def _assign_all(self) -> None:
        """Give every idle worker the next attempt of the first task that still wants one."""
        queue = deque(self.tasks.values())
        for worker in self.workers:
            if not worker.ready or worker.attempt is not None:
                continue
            while queue and not queue[0].wants_attempt:
                queue.popleft()
            if not queue:
                worker.deadline = math.inf
                continue
            task = queue[0]
            worker.attempt, worker.step = Attempt(task.name, task.next_number), 0
            worker.deadline = time.monotonic() + self.timeout_s
            task.next_number += 1
            task.running += 1
            worker.send(worker.attempt)

    def _finished(self, attempt: Attempt, table: pa.Table | None) -> None:
        task = self.tasks[attempt.task]
        task.running -= 1
        if table is None:
            task.failures += 1
        else:
            task.tables[attempt.number] = table
            self.kept += 1
        if self.on_progress is not None:
            kept = len(task.tables)
            self.on_progress(
                CollectProgress(
                    task=task.name,
                    kept=kept,
                    attempts=kept + task.failures,
                    total_kept=self.kept,
                    total=self.total,
                )
            )
        if task.hopeless:
            raise ConfigError(
                f"task {task.name!r}: the scripted expert succeeded in {len(task.tables)} of {task.next_number} "
                f"attempts, {task.wanted} successes were wanted. Lower demos.action_noise or demos.episodes_per_task, "
                "raise demos.max_attempts_factor or env.max_steps, or leave the task out of env.tasks."
            )
        if task.complete:
            path = self.folder / shard_name(task.name)
            metadata = {"collection_id": self.identity, "attempts": str(task.next_number)}
            with ShardWriter(path, metadata=metadata) as writer:
                for number in sorted(task.tables):
                    writer.write(task.tables[number])
            logger.info("%s: %d demonstrations from %d attempts", task.name, task.wanted, task.next_number)
            del self.tasks[task.name]

    def _worker_error(self, worker: ExpertProcess, what: str) -> WorkerError:
        where = "while building the environment"
        if worker.attempt is not None and self.num_starts is not None:
            start = worker.attempt.number % self.num_starts
            where = f"in task {worker.attempt.task!r}, train start {start}, after step {worker.step}"
        kind = getattr(self.env_config, "kind", "?")
        return WorkerError(
            f"demos: a worker of env {kind!r} {what}, {where}. Demonstrations of finished tasks are kept: run the same "
            "command again to continue; with demos.workers=1 a crash for lack of memory goes away."
        )
