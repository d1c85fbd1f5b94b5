"""Rendered decisions per second without a policy: `VectorEnv` against gymnasium's `AsyncVectorEnv`, in turns.

    python benchmarks/collecting.py [--num-envs 8]

Both step the same environments with the same random actions from the same start states and reset finished
rows within the step; their frames are compared on the way.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from reachrl.config.env import MetaworldConfig
from reachrl.envs.metaworld import MetaworldEnv
from reachrl.envs.vector import VectorEnv
from reachrl.types import Start


def starts(config: MetaworldConfig, row: int) -> Iterator[Start]:
    """The episodes of a row, one after the other; the first ones visit every task."""
    index = 0
    while True:
        yield Start(
            config.tasks[(row + index) % len(config.tasks)], "train", (7 * row + index) % config.num_train_starts
        )
        index += 1


class OwnStarts(gym.Wrapper):
    """Chooses the next start itself, as gymnasium's automatic reset passes no options."""

    def __init__(self, config: MetaworldConfig, row: int):
        super().__init__(MetaworldEnv(config))
        self._starts = starts(config, row)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        return self.env.reset(seed=seed, options={"start": next(self._starts)})


class Gymnasium:
    """`AsyncVectorEnv` behind the two calls that are timed."""

    def __init__(self, config: MetaworldConfig, num_envs: int):
        makers = [partial(OwnStarts, config, row) for row in range(num_envs)]
        self.envs = AsyncVectorEnv(makers, shared_memory=True, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)

    def pids(self) -> list[int]:
        return [process.pid for process in self.envs.processes if process.pid is not None]

    def reset(self) -> np.ndarray:
        return self.envs.reset()[0]["images"]["corner2"]

    def step(self, actions: np.ndarray) -> np.ndarray:
        return self.envs.step(actions)[0]["images"]["corner2"]


class ReachRL:
    """`VectorEnv` behind the same calls."""

    def __init__(self, config: MetaworldConfig, num_envs: int):
        self.envs = VectorEnv(config, num_envs)
        self._starts = [starts(config, row) for row in range(num_envs)]

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.envs._workers]

    def reset(self) -> np.ndarray:
        current = [next(row) for row in self._starts]
        self._next = [next(row) for row in self._starts]
        return self.envs.reset(current, self._next).frames

    def step(self, actions: np.ndarray) -> np.ndarray:
        step = self.envs.step(actions[:, None], self._next)
        for n in np.flatnonzero(step.terminated | step.truncated):
            self._next[n] = next(self._starts[n])
        return step.observation.frames


def cpu_seconds(pids: list[int]) -> float:
    """CPU time used so far by this process and the given ones; unlike the clock, hardly moved by a busy machine."""
    times = [psutil.Process(pid).cpu_times() for pid in (os.getpid(), *pids)]
    return sum(t.user + t.system for t in times)


def main() -> None:
    """Print decisions per second of both and their ratio."""
    os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="0")  # for gymnasium's workers as well
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60, help="vector steps per round")
    arguments = parser.parse_args()
    config = MetaworldConfig()
    sides = {"ReachRL": ReachRL(config, arguments.num_envs), "gymnasium": Gymnasium(config, arguments.num_envs)}
    first = {name: side.reset() for name, side in sides.items()}
    assert np.array_equal(first["ReachRL"], first["gymnasium"])
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    warm_up = -(-config.max_steps * len(config.tasks) // arguments.steps)  # every worker has built every task
    for turn in range(warm_up + arguments.rounds):
        actions = rng.uniform(-1, 1, (arguments.steps, arguments.num_envs, 4)).astype(np.float32)
        last = {}
        for name in sorted(sides, reverse=bool(turn % 2)):
            cpu_begin, begin = cpu_seconds(sides[name].pids()), time.perf_counter()
            for action in actions:
                last[name] = sides[name].step(action)
            if turn >= warm_up:
                decisions = arguments.steps * arguments.num_envs
                rates[name].append(decisions / (time.perf_counter() - begin))
                cpu[name].append((cpu_seconds(sides[name].pids()) - cpu_begin) / decisions * 1e3)
        assert np.array_equal(last["ReachRL"], last["gymnasium"])
    for side in sides.values():
        side.envs.close()
    print("decisions/s; ", end="")
    print(f"{arguments.num_envs} environments, {len(config.tasks)} tasks, {config.image_size} px, ", end="")
    print(f"{config.action_repeat} simulator steps a decision, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"{arguments.rounds} rounds of {arguments.steps} vector steps in turns, resets included")
    ratios = [a / b for a, b in zip(rates["ReachRL"], rates["gymnasium"], strict=True)]
    for name, values in (*rates.items(), ("ratio", ratios)):
        print(f"{name:>9}: median {statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})")
    for name, values in cpu.items():
        print(f"{name:>9}: {statistics.median(values):.2f} CPU ms a decision ({min(values):.2f}..{max(values):.2f})")


if __name__ == "__main__":
    main()
