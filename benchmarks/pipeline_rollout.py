"""The rollout of the pipeline simulator: environments in groups, decoded on devices, stepping on a node's cores.

Cores serve tasks whole, first come first served. Actors on one node therefore drift apart and fill each other's gaps,
where an operating system shares its time fairly and leaves them in step: `actors_per_node=1`, each actor with cores
of its own, is the careful reading.
"""

import heapq
import math
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from pipeline_layout import Layout, Stages


@dataclass(frozen=True)
class Rollout:
    """Length of a rollout, and seconds of work in it, summed over devices and over cores."""

    seconds: float
    device_s: float
    core_s: float


class Cores:
    """Cores of a node, first come first served: a `simpy.Resource` with one heap operation instead of events a task.

    Calls come in the order of time, so that a task's start is known as soon as it is handed in.
    """

    def __init__(self, count: int):
        self._free_at = [0.0] * count
        self.busy_s = 0.0

    def run(self, now: float, seconds: Sequence[float]) -> float:
        """Time at which the last of these tasks, one core each, is done."""
        end = now
        for task in seconds:
            if task > 0:  # an infinitely fast task waits for no core
                done = max(now, self._free_at[0]) + task
                heapq.heapreplace(self._free_at, done)
                self.busy_s += task
                end = max(end, done)
        return end

    def run_wide(self, now: float, seconds: float, width: int) -> float:
        """Time at which one task on `width` cores at once is done; cores that it has already wait for the others."""
        if seconds == 0:
            return now
        taken = [heapq.heappop(self._free_at) for _ in range(width)]
        done = max(now, taken[-1]) + seconds
        for _ in range(width):
            heapq.heappush(self._free_at, done)
        self.busy_s += width * seconds
        return done


def node_rollout(stages: Stages, layout: Layout, rows: tuple[int, ...], env_s: np.ndarray) -> Rollout:
    """One rollout of the actors on one node.

    Args:
        stages: the measured times.
        layout: steps, groups and cores.
        rows: environments of each actor of this node.
        env_s: [num_steps, sum(rows)], seconds on a core of each environment step.
    """
    env, cores, device_s = simpy.Environment(), Cores(layout.cores), 0.0

    def collect(device: simpy.Resource, decode_s: float, group_s: list[list[float]]) -> Generator[Any, Any, None]:
        for step_s in group_s:
            with device.request() as turn:
                yield turn
                wide = layout.decode_on_cpu
                done = cores.run_wide(env.now, decode_s, layout.decode_cores) if wide else env.now + decode_s
                yield env.timeout(done - env.now)
            done = cores.run(env.now, step_s) + stages.env_wait_s
            yield env.timeout(done - env.now + stages.step_fixed_s)

    start = 0
    for actor_rows in rows:
        device = simpy.Resource(env)
        for size in layout.group_rows(actor_rows):
            decode_s = stages.decode_fixed_s + stages.decode_row_s * size
            env.process(collect(device, decode_s, env_s[:, start : start + size].tolist()))
            device_s += decode_s * layout.num_steps
            start += size
    env.run()
    return Rollout(env.now, device_s, cores.busy_s)


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
