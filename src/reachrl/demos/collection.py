"""Scripted experts in parallel processes: assigns attempts, keeps successes, writes each task's shard."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pyarrow as pa

from reachrl import errors
from reachrl.config.base import Section
from reachrl.config.demos import DemosSection
from reachrl.demos.expert import Attempt
from reachrl.demos.shard import ShardWriter
from reachrl.errors import ConfigError, WorkerError
from reachrl.registry import resolve, send
from reachrl.run.cores import available_cores
from reachrl.run.file_names import file_name
from reachrl.worker import WorkerLost, WorkerProcess

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
    """The attempts at one task, assigned in order and never more than could still be needed.

    An attempt is only assigned while successes and running attempts together are fewer than wanted, so the successes
    with the lowest numbers are kept, whichever attempt finishes first.
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


@dataclass(slots=True)
class _Expert:
    """A worker process and what it is doing."""

    process: WorkerProcess
    deadline: float  # `time.monotonic()` by which its next message is due, in seconds
    ready: bool = False
    attempt: Attempt | None = None
    step: int = 0


def shard_name(task: str) -> str:
    """The file that holds the demonstrations of `task`."""
    return file_name(task, ".parquet")


class Collection:
    """Assigns attempts to expert processes, keeps successes and writes a shard when a task is complete."""

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
        check: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self.env_config, self.config, self.folder, self.seed = env_config, config, folder, seed
        self.identity, self.on_progress, self.check = identity, on_progress, check
        wanted = config.episodes_per_task
        max_attempts = math.ceil(config.max_attempts_factor * wanted)
        self.tasks = {task: _Task(task, wanted, max_attempts) for task in missing}
        self.total = wanted * len(tasks)
        self.kept = wanted * (len(tasks) - len(missing))
        self.timeout_s = float(getattr(env_config, "worker_timeout_s", 60.0))
        self.num_starts: int | None = None
        self.workers: list[_Expert] = []

    def run(self) -> None:
        """Collect all missing tasks; workers are stopped whatever happens."""
        cores = available_cores()
        count = min(self.config.workers or cores, self.config.episodes_per_task * len(self.tasks))
        kind: str = self.env_config.kind  # pyright: ignore[reportAttributeAccessIssue]
        setup = {
            "kind": kind,
            "code": send("envs", kind),
            "env": self.env_config.model_dump(mode="json"),
            "demos": self.config.model_dump(mode="json"),
            "seed": self.seed,
        }
        limit_s = max(START_TIMEOUT_S, self.timeout_s) * max(1.0, count / cores)
        try:
            env = resolve("envs", kind)
            for number in range(count):
                variables = env.worker_variables(self.env_config, number)
                process = WorkerProcess("reachrl.demos.expert", setup, variables)
                self.workers.append(_Expert(process, deadline=time.monotonic() + limit_s))
                process.send(do="describe")
            while self.tasks:
                self._poll()
        finally:
            for worker in self.workers:
                worker.process.kill()

    def _poll(self) -> None:
        """Wait for messages, or for the first deadline."""
        first = min(worker.deadline for worker in self.workers)
        pipes = {worker.process.connection: worker for worker in self.workers}
        for pipe in wait(list(pipes), timeout=max(0.0, first - time.monotonic())):
            self._receive(pipes[pipe])  # pyright: ignore[reportArgumentType]
        now = time.monotonic()
        for worker in self.workers:
            if worker.deadline < now and not worker.process.connection.poll():
                raise self._worker_error(worker, self._silence(worker))

    def _silence(self, worker: _Expert) -> str:
        if worker.ready:
            return f"hangs: it has been silent for {self.timeout_s:g} s (env.worker_timeout_s)"
        least = max(START_TIMEOUT_S, self.timeout_s)
        return f"is not ready in time; set env.worker_timeout_s above {least:g} to wait longer, or lower demos.workers"

    def _receive(self, worker: _Expert) -> None:
        try:
            message = worker.process.receive()
        except WorkerLost as lost:
            if own := getattr(errors, lost.kind or "", None):
                raise own(str(lost)) from None
            raise self._worker_error(worker, f"was lost: {lost}") from lost
        worker.deadline = time.monotonic() + self.timeout_s
        if "step" in message:
            worker.step = message["step"]
            return
        if worker.attempt is None:
            if self.check is not None and self.num_starts is None:
                self.check(message)
            self._check(message["tasks"], message["num_starts"])
            worker.ready = True
        else:
            attempt, worker.attempt = worker.attempt, None
            data = message["data"]
            self._finished(attempt, None if data is None else pa.ipc.open_stream(data).read_all())
        self._assign_all()

    def _check(self, tasks: Sequence[str], num_starts: int) -> None:
        if unknown := [task for task in self.tasks if task not in tasks]:
            raise ConfigError(f"env.tasks: unknown task {unknown[0]!r}; the environment has {', '.join(tasks)}.")
        self.num_starts = num_starts
        if self.config.action_noise == 0 or self.config.noise_probability == 0:
            for task in self.tasks.values():  # without noise a second round would repeat the first
                task.max_attempts = min(task.max_attempts, num_starts)

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
            worker.process.send(do="attempt", task=task.name, number=worker.attempt.number)

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

    def _worker_error(self, worker: _Expert, what: str) -> WorkerError:
        where = "while building the environment"
        if worker.attempt is not None and self.num_starts is not None:
            start = worker.attempt.number % self.num_starts
            where = f"in task {worker.attempt.task!r}, train start {start}, after step {worker.step}"
        kind = getattr(self.env_config, "kind", "?")
        return WorkerError(
            f"demos: a worker of env {kind!r}, {where}, {what}. Demonstrations of finished tasks are kept: run the "
            "same command again to continue; with demos.workers=1 a crash for lack of memory goes away."
        )
