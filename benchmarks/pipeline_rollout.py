"""The rollout of the pipeline simulator: environments in groups, decoded on devices, stepping on a node's cores.

Cores are shared as by an operating system whose time slices are infinitely short. Decoding on the CPU takes its cores
first and at once, as simulators run at lower priority; what it leaves is divided equally among the environment steps
in progress, at most one core each. Actors on one node that start together and are alike stay in step.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline_layout import Layout, Stages

ROUNDING_S = 1e-9
"""What is left of a task that is done, but for rounding."""


@dataclass(frozen=True)
class Rollout:
    """Length of a rollout, and seconds of work in it, summed over devices and over cores."""

    seconds: float
    device_s: float
    core_s: float


@dataclass(eq=False)
class Group:
    """Environments of an actor that are decoded together and step together."""

    device: "deque[Group]"
    """Groups of the actor that want to decode; the first of them does."""
    decode_s: float
    steps_s: list[list[float]]
    """Seconds on a core, by step and by environment."""
    step: int = 0
    running: int = 0
    """Tasks that have to end before the group goes on."""


class Pool:
    """Tasks that all advance at the same speed, which may change at any time.

    `level` is the work that a task would have got since the beginning. A task of s seconds that starts at level x is
    done at level x + s, whatever the speeds on the way there: a change of speed touches no task.
    """

    def __init__(self):
        self.speed, self.level, self.running = 1.0, 0.0, 0
        self._ends: list[tuple[float, int, int, Group]] = []
        self._order = itertools.count()

    def add(self, group: Group, seconds: Iterable[float]) -> None:
        """Start tasks of a group. Equal ones end together and are one entry of the heap."""
        for task_s, tasks in Counter(seconds).items():
            heapq.heappush(self._ends, (self.level + task_s, next(self._order), tasks, group))
            self.running += tasks
            group.running += tasks

    def next_s(self) -> float:
        """Seconds until the next task is done, if no speed changes before."""
        left = self._ends[0][0] - self.level if self._ends else math.inf
        if left <= ROUNDING_S:  # also a task that takes no time: it waits for no core
            return 0.0
        return left / self.speed if self.speed else math.inf

    def end(self) -> Group:
        """Take out the task that is done next, with the equal ones of its group."""
        _, _, tasks, group = heapq.heappop(self._ends)
        self.running -= tasks
        group.running -= tasks
        return group


class Node:
    """The groups of the actors on one node: each decodes, simulates and waits, in turn and beside the others."""

    def __init__(self, stages: Stages, layout: Layout):
        self.decoding, self.simulating, self.waiting = Pool(), Pool(), Pool()
        self._cores = layout.cores
        self._decode_cores = layout.decode_cores if layout.decode_on_cpu else 0
        self._wait_s = stages.env_wait_s + stages.step_fixed_s

    def start_step(self, group: Group) -> None:
        """Decode a group as soon as the device is free."""
        group.device.append(group)
        if group.device[0] is group:
            self.decoding.add(group, [group.decode_s])

    def run(self) -> float:
        """Time at which all groups have made all of their steps."""
        pools = (self.decoding, self.simulating, self.waiting)
        while True:
            self._share_cores()
            pool = min(pools, key=Pool.next_s)
            passed_s = pool.next_s()
            if passed_s == math.inf:
                return self.waiting.level  # always at full speed: this level is the time
            for each in pools:
                each.level += passed_s * each.speed
            group = pool.end()
            if not group.running:
                self._go_on(group, pool)

    def _share_cores(self) -> None:
        """Decoding gets what it wants, or shares all cores; simulators share the others, at most one each."""
        wanted = self.decoding.running * self._decode_cores
        self.decoding.speed = min(1.0, self._cores / max(wanted, 1))
        left = max(self._cores - wanted, 0)
        self.simulating.speed = min(1.0, left / max(self.simulating.running, 1))

    def _go_on(self, group: Group, done: Pool) -> None:
        """Start what follows for a group that is done with its tasks in a pool."""
        if done is self.decoding:
            group.device.popleft()
            if group.device:
                self.decoding.add(group.device[0], [group.device[0].decode_s])
            self.simulating.add(group, group.steps_s[group.step])
        elif done is self.simulating:
            self.waiting.add(group, [self._wait_s])
        else:
            group.step += 1
            if group.step < len(group.steps_s):
                self.start_step(group)


def node_rollout(stages: Stages, layout: Layout, rows: tuple[int, ...], env_s: np.ndarray) -> Rollout:
    """One rollout of the actors on one node.

    Args:
        stages: the measured times.
        layout: steps, groups and cores.
        rows: environments of each actor of this node.
        env_s: [num_steps, sum(rows)], seconds on a core of each environment step.
    """
    node, device_s, start = Node(stages, layout), 0.0, 0
    for actor_rows in rows:
        device: deque[Group] = deque()
        for size in layout.group_rows(actor_rows):
            decode_s = stages.decode_fixed_s + stages.decode_row_s * size
            node.start_step(Group(device, decode_s, env_s[:, start : start + size].tolist()))
            device_s += decode_s * layout.num_steps
            start += size
    core_s = float(env_s.sum()) + (device_s * layout.decode_cores if layout.decode_on_cpu else 0.0)
    return Rollout(node.run(), device_s, core_s)


def collect_rollouts(stages: Stages, layout: Layout, count: int, seed: int) -> list[Rollout]:
    """Rollouts of all nodes. Nodes meet only at the end of a rollout, so that each is simulated by itself."""
    if stages.env_step_cv == 0:  # every rollout is the same, and so are nodes with the same rows
        parts = []
        for rows, times in Counter(layout.nodes).items():
            node = node_rollout(stages, layout, rows, np.full((layout.num_steps, sum(rows)), stages.env_step_s))
            parts.append(Rollout(node.seconds, node.device_s * times, node.core_s * times))
        return [_join(parts)] * count
    spread = math.sqrt(math.log1p(stages.env_step_cv**2))
    rollouts = []
    for index in range(count):
        parts = []
        for number, rows in enumerate(layout.nodes):
            # Drawn before anything runs: with one stage faster, each environment step still takes what it took.
            generator = np.random.default_rng([seed, index, number])
            factors = generator.lognormal(-(spread**2) / 2, spread, (layout.num_steps, sum(rows)))
            parts.append(node_rollout(stages, layout, rows, stages.env_step_s * factors))
        rollouts.append(_join(parts))
    return rollouts


def _join(parts: list[Rollout]) -> Rollout:
    seconds = max(part.seconds for part in parts)
    return Rollout(seconds, sum(part.device_s for part in parts), sum(part.core_s for part in parts))
