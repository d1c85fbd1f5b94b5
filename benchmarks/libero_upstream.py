"""LIBERO: our two simulations against upstream's own environment, step by step and in turns.

    python benchmarks/libero_upstream.py speed [--suite libero_object] [--task 0] [--size 128] [--steps 60]
    python benchmarks/libero_upstream.py parity --out parity.jsonl [--suites libero_spatial ...] [--start 0]

Each of the three has its own process, as robosuite's renderer and ours disturb each other in one. `speed` pins them to
one core, where one works at a time. `parity` plays an episode of the scripted expert from a stored start state of every
task in all three at once and compares joint positions, success, length and frames; tasks that are in the file already
are left out, so it can be stopped and started again.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from reachrl.config.libero import LiberoConfig
from reachrl.config.libero_tasks import STEP_LIMITS, SUITES
from reachrl.envs.libero import installation
from reachrl.envs.libero.assets import find_assets
from reachrl.types import Start

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "0")

SIDES = ("stock", "faithful", "fast")
SETTLING = [[0.0] * 6 + [-1.0]] * 10


class Stock:
    """Upstream's environment as its own evaluation scripts use it."""

    def __init__(self, size: int):
        folder = tempfile.mkdtemp()
        os.environ["LIBERO_CONFIG_PATH"], os.environ["MUJOCO_GL"] = folder, "egl"
        (Path(folder) / "config.yaml").touch()
        import libero.libero  # pyright: ignore[reportMissingImports]

        libero.libero._assets_path_cache = str(find_assets(None))
        self.size, self.env = size, None

    def reset(self, suite: str, task: str, start: int) -> None:
        """Construct the task, seed it, reset it, set the stored state, wait ten steps."""
        from libero.libero.envs import OffScreenRenderEnv  # pyright: ignore[reportMissingImports]

        if self.env is not None:
            self.env.close()
        path = str(installation.bddl_file(suite, task))
        self.env = OffScreenRenderEnv(bddl_file_name=path, camera_heights=self.size, camera_widths=self.size)
        self.env.seed(start)
        self.again(suite, task, start)

    def again(self, suite: str, task: str, start: int) -> None:
        """A second episode of the same task."""
        assert self.env is not None
        self.env.reset()
        self.env.set_init_state(installation.stored_starts(suite, task)[start])
        for action in SETTLING:
            self.env.step(action)

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """One control step."""
        assert self.env is not None
        seen, _, solved, _ = self.env.step(action)
        return {
            "positions": self.env.sim.data.qpos.copy(),
            "success": bool(solved),
            "frame": seen["agentview_image"][::-1, ::-1],
        }


class Ours:
    """`LiberoEnv` in one of its two simulations."""

    def __init__(self, size: int, simulation: str):
        self.size, self.simulation, self.env = size, simulation, None

    def reset(self, suite: str, task: str, start: int) -> None:
        """Make the suite's environment and begin the episode."""
        from reachrl.envs.libero.env import LiberoEnv

        if self.env is None or self.env.config.suite != suite:
            config = {"suite": suite, "image_size": self.size, "simulation": self.simulation}
            self.env = LiberoEnv(LiberoConfig.model_validate(config))
        self.again(suite, task, start)

    def again(self, suite: str, task: str, start: int) -> None:
        """A second episode of the same task."""
        assert self.env is not None
        self.task = task
        self.env.reset(options={"start": Start(task, "eval", start)})

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """One decision."""
        assert self.env is not None
        seen, _, success, *_ = self.env.step(action)
        positions = self.env.task_starts(self.task).simulation.data.qpos.copy()
        return {"positions": positions, "success": success, "frame": seen["images"]["agentview"]}

    def expert(self) -> np.ndarray:
        """The scripted expert's action."""
        assert self.env is not None
        return self.env.expert_action()


def stop(pipes: dict[str, Connection]) -> None:
    """Let the three processes end."""
    for pipe in pipes.values():
        pipe.send(None)


def serve(pipe: Connection, side: str, size: int, core: int | None) -> None:
    """Do what is asked; answer with the result, wall and CPU seconds, memory now and at most."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    actor: Any = Stock(size) if side == "stock" else Ours(size, side)
    while (request := pipe.recv()) is not None:
        what, arguments = request
        wall, cpu = time.perf_counter(), time.process_time()
        result = getattr(actor, what)(*arguments)
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((result, *seconds, (psutil.Process().memory_info().rss, most)))
    os._exit(0)


def ask(pipes: dict[str, Connection], what: str, *arguments: Any, sides: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """The sides' answers; they work at the same time."""
    for side in sides:
        pipes[side].send((what, arguments))
    return {side: pipes[side].recv() for side in sides}


def start(size: int, core: int | None) -> dict[str, Connection]:
    """The three processes."""
    context, pipes = get_context("spawn"), {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, size, core), daemon=True).start()
    return pipes


def speed(suite: str, number: int, size: int, steps: int) -> None:
    """Seconds of CPU of resets and rendered steps, and memory, one side at a time on one core."""
    pipes, task = start(size, core=0), SUITES[suite][number]
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    resets: dict[str, list[float]] = {side: [] for side in SIDES}
    memory: dict[str, tuple[float, float]] = {}
    first = {side: ask(pipes, "reset", suite, task, 0, sides=(side,))[side][2] for side in SIDES}
    for again in range(3):
        for side in SIDES:
            resets[side].append(ask(pipes, "again", suite, task, again, sides=(side,))[side][2])
        for _ in range(steps):
            action = rng.uniform(-1, 1, 7).astype(np.float32)
            for side in SIDES:
                _, _, cpu, memory[side] = ask(pipes, "step", action, sides=(side,))[side]
                seconds[side].append(cpu)
    stop(pipes)
    print(f"{suite} task {number}, {size} px, {3 * steps} random decisions each, one core; seconds of CPU")
    stock = statistics.median(seconds["stock"])
    for side in SIDES:
        median, (now, most) = statistics.median(seconds[side]), memory[side]
        print(
            f"{side:9s} a rendered step {1000 * median:7.2f} ms = {stock / median:5.1f} x stock; reset and settling "
            f"{statistics.median(resets[side]):6.3f} s, the first {first[side]:6.3f} s; "
            f"memory {now / 1e9:.2f} GB, at most {most / 1e9:.2f} GB",
            flush=True,
        )


def parity(suites: list[str], number: int, size: int, most: int | None, out: Path) -> None:
    """One expert episode of every task, or the beginning of one, in all three."""
    done = {
        (line["suite"], line["task"])
        for line in map(json.loads, out.read_text(encoding="utf-8").splitlines() if out.exists() else ())
    }
    for suite in suites:
        for index, task in enumerate(SUITES[suite]):
            if (suite, index) in done:
                continue
            pipes = start(size, core=None)  # memory of one task at a time
            line = {"suite": suite, "task": index, **compared(pipes, suite, task, number, most)}
            stop(pipes)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def compared(pipes: dict[str, Connection], suite: str, task: str, number: int, most: int | None) -> dict[str, Any]:
    """Greatest differences of joint positions and, averaged over a frame, of pixels from upstream's."""
    ask(pipes, "reset", suite, task, number)
    gaps, frames, success = {"faithful": 0.0, "fast": 0.0}, {"faithful": 0.0, "fast": 0.0}, dict.fromkeys(SIDES)
    steps, same = 0, True
    while steps < (most or STEP_LIMITS[suite]) and not any(success.values()):
        action = ask(pipes, "expert", sides=("fast",))["fast"][0]
        found = {side: answer[0] for side, answer in ask(pipes, "step", action).items()}
        success = {side: found[side]["success"] for side in SIDES}
        same = same and len(set(success.values())) == 1
        for side in gaps:
            gap = np.abs(found[side]["positions"] - found["stock"]["positions"]).max()
            gaps[side] = max(gaps[side], float(gap))
            different = np.abs(found[side]["frame"].astype(float) - found["stock"]["frame"]).mean()
            frames[side] = max(frames[side], float(different))
        steps += 1
    line = {"success": success["stock"], "steps": steps, "same_outcome": same}
    line |= {f"{side}_positions": gaps[side] for side in gaps}
    return line | {f"{side}_frames": round(frames[side], 3) for side in frames}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    fast = what.add_parser("speed")
    fast.add_argument("--suite", default="libero_object", choices=list(SUITES))
    fast.add_argument("--task", type=int, default=0)
    fast.add_argument("--size", type=int, default=128)
    fast.add_argument("--steps", type=int, default=60)
    same = what.add_parser("parity")
    same.add_argument("--suites", nargs="+", default=list(SUITES))
    same.add_argument("--out", type=Path, required=True, help="file of results, one line a task")
    same.add_argument("--start", type=int, default=0)
    same.add_argument("--size", type=int, default=64)
    same.add_argument("--steps", type=int, help="compare so many at most; unset: whole episodes")
    asked = parser.parse_args()
    if asked.what == "speed":
        speed(asked.suite, asked.task, asked.size, asked.steps)
    else:
        parity(asked.suites, asked.start, asked.size, asked.steps, asked.out)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
