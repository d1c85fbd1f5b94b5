"""`N` environments stepped together in processes of their own; lost workers are replaced, not fatal."""

import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from reachrl import errors
from reachrl.config.env import EnvSection
from reachrl.envs.base import Shown
from reachrl.envs.batch import EnvBatch, check_finite, is_batched
from reachrl.envs.shared_arrays import SharedArrays, anonymous_file
from reachrl.envs.timeouts import hung, start_timeout, too_late
from reachrl.registry import resolve, send
from reachrl.run.cores import available_cores
from reachrl.types import EnvStep, Observation, Split, Start
from reachrl.worker import WorkerLost, WorkerProcess

_MAX_LOSSES = 3  # of the same environment without a finished episode in between; one more is an error
_NICENESS = 10


class VectorEnv(EnvBatch):
    """Steps `num_envs` copies of the environment that `config.kind` names in worker processes.

    Each has a process of its own, or shares one with others where the kind says `shares_process`: then there are as
    many processes as cores. An episode that ends is followed at once, in the same `step`, by the row's next start. A
    worker that dies, raises or exceeds `config.worker_timeout_s` is replaced; its rows of that step are marked invalid.

    Args:
        config: the environment's section.
        num_envs: N.

    Raises:
        ReachRLError: the environment cannot be made.
    """

    def __init__(self, config: EnvSection, num_envs: int):
        kind = resolve("envs", config.kind)
        kind.prepare(config)
        self.num_envs = num_envs
        count = min(num_envs, available_cores()) if kind.shares_process else num_envs
        self._rows = [list(range(number, num_envs, count)) for number in range(count)]  # of each worker
        self.lost_episodes = 0
        self._config = config
        self._memory = memory = anonymous_file()  # it gets its size when the workers have said what they show
        self._code = send("envs", config.kind)
        self._workers: list[WorkerProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._workers, memory)
        self._losses = [0] * num_envs
        self._starts: list[Start | None] = [None] * num_envs
        self._steps = [0] * num_envs
        self._next_starts: list[Start] = []  # of the decision under way
        self._chunk = 1  # actions of it
        self._start_timeout_s = start_timeout(config.worker_timeout_s, max(num_envs, config.num_envs))
        try:
            self._workers.extend(self._spawn(number) for number in range(count))
        except BaseException:
            self.close()
            raise
        for number, reply in self._gather(range(count), self._start_timeout_s, starting=True).items():
            if isinstance(reply, WorkerLost) and not reply.kind:  # once more: it may not have been its own fault
                reply = self._restart(number)
            if isinstance(reply, WorkerLost):
                self.close()
                raise self._error(self._rows[number][0], reply, "could not be made")
            self._facts = reply
        self.shown = Shown.from_json(self._facts["shown"])
        memory.truncate(SharedArrays.size(num_envs, self.shown))
        self._arrays = SharedArrays(memory.fileno(), num_envs, self.shown)
        self.tasks: tuple[str, ...] = tuple(self._facts["tasks"])
        self.action_dim: int = self._facts["action_dim"]
        self.action_bounds = np.array(self._facts["action_bounds"], np.float32)
        self.control_hz: float | None = self._facts["control_hz"]
        self.execute = config.execute

    def instruction(self, task: str) -> str:
        """The sentence that describes `task`."""
        return self._facts["instructions"][task]

    def num_starts(self, split: Split) -> int:
        """How many numbered start states each task has in `split`."""
        return self._facts["num_starts"][split]

    def replay(self, starts: Sequence[Start], actions: Sequence[Float32[np.ndarray, "k D"]]) -> Observation:
        """Bring each environment to where its actions lead from its start."""
        self._check(starts)
        self._begin({n: (start, actions[n]) for n, start in enumerate(starts)})
        return self._observation()

    def send(self, actions: Float32[np.ndarray, "N K D"], next_starts: Sequence[Start]) -> None:
        """Begin one decision in every environment and return at once."""
        self._check(next_starts)
        self._check_actions(actions, self._config.kind)
        check_finite("the policy's action", actions, np.ones(self.num_envs, bool), self._places())
        for rows, worker in zip(self._rows, self._workers, strict=True):
            follow = [_packed(next_starts[n]) for n in rows]
            worker.send(do="step", actions=actions[rows].tolist(), next_starts=follow)
        self._next_starts, self._chunk = list(next_starts), actions.shape[1]

    def receive(self) -> EnvStep:
        """Wait for the decision that `send` began.

        Returns:
            The outcome; rows that ended, or whose worker was lost, already show their next episode.

        Raises:
            WorkerError: the same environment was lost too often in a row.
            ExtensionError: an end-effector state is not finite; names the environment, the start and the step.
        """
        next_starts = self._next_starts
        limit = self._chunk * len(self._rows[0]) * self._config.worker_timeout_s
        replies = self._gather(range(len(self._rows)), limit)
        flags, executed = np.zeros((self.num_envs, 3), bool), np.zeros(self.num_envs, np.int32)
        valid = np.zeros(self.num_envs, bool)
        for number, reply in replies.items():
            valid[self._rows[number]] = not isinstance(reply, WorkerLost)
        check_finite("ee_state (x, y, z, gripper)", self._arrays.ee_state, valid, self._places())
        played = list(self._starts)
        for number, reply in replies.items():
            if isinstance(reply, WorkerLost):
                self._replace(number, reply)
            else:
                rows = self._rows[number]
                flags[rows], executed[rows] = reply["flags"], reply["executed"]
        for n in np.flatnonzero(valid).tolist():
            self._steps[n] += int(executed[n])
            if flags[n, 1:].any():
                self._starts[n], self._steps[n], self._losses[n] = next_starts[n], 0, 0
        ee_state, progress = self._arrays.ee_state.copy(), self._arrays.progress.copy()
        final_observation = self._copied(played, self._arrays.final_images, self._arrays.final_state)
        nothing = np.zeros((0, self.action_dim), np.float32)
        self._begin({n: (next_starts[n], nothing) for n in range(self.num_envs) if not valid[n]})
        observation = self._observation()
        ended = flags[:, 1] | flags[:, 2]
        for shown, rows in ((observation.state, valid), (final_observation.state, ended)):
            if shown is not None:
                check_finite("state", shown, rows, self._places())
        return EnvStep(
            observation=observation,
            success=flags[:, 0],
            terminated=flags[:, 1],
            truncated=flags[:, 2],
            valid=valid,
            executed=executed,
            final_observation=final_observation,
            ee_state=ee_state,
            progress=progress,
        )

    def close(self) -> None:
        """End the workers and free the shared memory; safe to call twice."""
        self._finalizer()

    # ---- workers ----

    def _spawn(self, number: int) -> WorkerProcess:
        alone = len(self._rows) == self.num_envs
        worker = WorkerProcess(
            "reachrl.envs.worker",
            {
                "kind": self._config.kind,
                "code": self._code,
                "config": self._config.model_dump(mode="json"),
                "rows": self._rows[number],
                "num_envs": self.num_envs,
                "memory": self._memory.fileno(),
                # Many wait for the process that decodes actions: it has priority. As few as cores need their share.
                "niceness": _NICENESS if alone else 0,
            },
            resolve("envs", self._config.kind).worker_variables(self._config, number),
            files=(self._memory.fileno(),),
        )
        worker.send(do="describe")
        return worker

    def _begin(self, episodes: dict[int, tuple[Start, np.ndarray]]) -> None:
        """Reset and replay the given rows, all of a worker's; retry with a new worker where one is lost."""
        while episodes:
            for n, (start, actions) in episodes.items():
                self._starts[n], self._steps[n] = start, len(actions)
            begun = [number for number, rows in enumerate(self._rows) if rows[0] in episodes]
            for number in begun:
                parts = [(_packed(episodes[n][0]), np.asarray(episodes[n][1]).tolist()) for n in self._rows[number]]
                self._workers[number].send(do="reset", episodes=parts)
            longest = max(len(actions) for _, actions in episodes.values())
            limit = self._start_timeout_s + longest * len(self._rows[0]) * self._config.worker_timeout_s
            replies = self._gather(begun, limit, starting=True)
            lost = {number: reply for number, reply in replies.items() if isinstance(reply, WorkerLost)}
            for number, reply in lost.items():
                self._replace(number, reply)
            episodes = {n: episodes[n] for number in lost for n in self._rows[number]}

    def _gather(
        self, numbers: Iterable[int], timeout_s: float, *, starting: bool = False
    ) -> dict[int, dict[str, Any] | WorkerLost]:
        """Wait for one reply per worker; one that is lost gets a `WorkerLost` instead."""
        late = WorkerLost(too_late(self._config, timeout_s) if starting else hung(timeout_s))
        replies: dict[int, dict[str, Any] | WorkerLost] = {}
        deadline = time.monotonic() + timeout_s
        try:
            for n in sorted(numbers, reverse=True):  # the last asked answers last: one wait instead of one for each
                if not self._workers[n].connection.poll(max(0.0, deadline - time.monotonic())):
                    replies[n] = late
                    continue
                try:
                    replies[n] = self._workers[n].receive()
                except WorkerLost as lost:
                    replies[n] = lost
        except BaseException:  # Ctrl-C: answers still under way would be taken for those of the next command
            self.close()
            raise
        return dict(sorted(replies.items()))

    def _replace(self, number: int, lost: WorkerLost) -> None:
        """A new worker for the rows of worker `number`, unless this has happened too often."""
        rows = self._rows[number]
        self.lost_episodes += len(rows)
        stepping = [n for n in rows if self._arrays.stepping[n]] or rows  # when it was lost
        self._arrays.stepping[rows] = 0
        for n in stepping:
            self._losses[n] += 1
        n = max(stepping, key=lambda each: self._losses[each])
        if self._losses[n] > _MAX_LOSSES or lost.kind:  # retrying does not help where the user must fix something
            error = self._error(n, lost, f"was lost {self._losses[n]} times in a row")
            self.close()
            raise error
        reply = self._restart(number)
        if isinstance(reply, WorkerLost):
            self._replace(number, reply)

    def _restart(self, number: int) -> dict[str, Any] | WorkerLost:
        """A new worker instead of worker `number`; its description, or why it is lost as well."""
        self._workers[number].kill()
        self._workers[number] = self._spawn(number)
        return self._gather([number], self._start_timeout_s, starting=True)[number]

    def _error(self, n: int, lost: WorkerLost, what: str) -> errors.ReachRLError:
        own = getattr(errors, lost.kind, None) if lost.kind else None
        if own is not None:
            return own(str(lost))  # a missing library or a wrong option, in its own words
        return errors.WorkerError(f"{self._where(n)} {what}: {lost}")

    def _where(self, n: int) -> str:
        start = self._starts[n]
        where = f", task {start.task!r}, {start.split} start {start.index}, step {self._steps[n]}" if start else ""
        return f"environment {n} ({self._config.kind}{where})"

    def _places(self) -> list[str]:
        return [self._where(n) for n in range(self.num_envs)]

    # ---- rows ----

    def _observation(self) -> Observation:
        return self._copied(self._starts, self._arrays.images, self._arrays.state)

    def _copied(
        self, starts: Sequence[Start | None], images: dict[str, np.ndarray], state: np.ndarray | None
    ) -> Observation:
        return Observation(
            images={camera: frames.copy() for camera, frames in images.items()},
            instructions=tuple(self._spoken(self._config, start) for start in starts if start is not None),
            state=None if state is None else state.copy(),
        )

    def _check(self, starts: Sequence[Start]) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this VectorEnv is closed")
        super()._check(starts)


def open_envs(config: EnvSection, num_envs: int) -> EnvBatch:
    """`num_envs` environments of the kind that `config` names: in worker processes, or one simulator of them all.

    Raises:
        ReachRLError: they cannot be made.
    """
    kind = resolve("envs", config.kind)
    if not is_batched(kind):
        return VectorEnv(config, num_envs)
    kind.prepare(config)
    return kind(config, num_envs)


def _packed(start: Start) -> tuple[str, str, int, str]:
    return start.task, start.split, start.index, start.variant


def _end(workers: list[WorkerProcess], memory: Any) -> None:
    for worker in workers:
        worker.kill()
    memory.close()
