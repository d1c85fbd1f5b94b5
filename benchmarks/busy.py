"""Small layers beside other programs: how waiting OpenMP threads of PyTorch spin decides the time they take.

    nice -n -20 python benchmarks/busy.py > docs/benchmarks/busy.md

Three settings of the runtime, each in a process of its own that measures alone and beside busy processes of the same
and of lower priority. A measurement whose process was given another priority meanwhile is refused.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch

from reachrl.config.loading import load_config
from reachrl.registry import build
from reachrl.run.cores import available_cores
from reachrl.threads import BLOCK_TIME_MS, SPIN_COUNT
from reachrl.types import Observation

SETTINGS: dict[str, dict[str, str]] = {
    "the runtime's default": {},  # PyTorch is imported above before reachrl bounds the spinning
    f"{SPIN_COUNT} rounds (ours)": {"GOMP_SPINCOUNT": SPIN_COUNT, "KMP_BLOCKTIME": BLOCK_TIME_MS},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
# Busy processes, and how much lower their priority is.
LOADS = [(0, 0), (1, 0), (2, 0), (4, 0), (1, 10), (2, 10), (4, 10)]
# Ends by itself if its parent dies.
BUSY = "import os, signal, sys; os.nice(int(sys.argv[1])); signal.alarm(30)\nwhile True: pass"


def parts() -> dict[str, Callable[[], object]]:
    """What an iteration of the quickstart consists of, without its simulators."""
    config = load_config("metaworld_quickstart", [])
    torch.manual_seed(config.seed)
    policy = build("policies", config.policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    random, size = np.random.default_rng(0), config.env.image_size

    def seen(rows: int):
        images = random.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
        return policy.encode(Observation(images={"camera": images}, instructions=("close the window",) * rows))

    acting, scoring, training = seen(15), seen(256), seen(64)
    ids = policy.act(scoring).token_ids

    @torch.no_grad()
    def score() -> None:
        policy.evaluate(scoring, ids)

    def step() -> None:
        out = policy.evaluate(training, ids[:64])
        assert out.values is not None
        optimizer.zero_grad()
        (out.values.square().mean() - out.logprobs.mean()).backward()
        optimizer.step()

    return {"act, 15 rows": lambda: policy.act(acting), "score, 256 rows": score, "train, 64 rows": step}


def measure(seconds: float) -> None:
    """Whenever a line arrives: print the mean milliseconds of each part, and this process's priority."""
    contenders = parts()
    for run in contenders.values():
        run()
    print("{}", flush=True)
    for _ in sys.stdin:
        taken: dict[str, float] = {}
        for name, run in contenders.items():
            times, end = [], time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            taken[name] = statistics.fmean(times) * 1e3
        print(json.dumps(taken | {"priority": os.getpriority(os.PRIO_PROCESS, 0)}), flush=True)


def beside(count: int, lower: int, process: subprocess.Popen[str]) -> dict[str, float]:
    """One measurement beside `count` busy processes."""
    assert process.stdin is not None and process.stdout is not None
    with ExitStack() as others:
        for _ in range(count):
            other = subprocess.Popen([sys.executable, "-c", BUSY, str(lower)])
            others.callback(other.wait)
            others.callback(other.kill)
        time.sleep(0.2 if count else 0)  # until they have begun
        process.stdin.write("\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each part in each measurement")
    parser.add_argument("--measure", action="store_true", help="what the processes that measure are started with")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.seconds)
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    print("# Beside other programs\n")
    print(f"`python benchmarks/busy.py`: {available_cores()} cores, torch {torch.__version__}; milliseconds, ", end="")
    print(f"mean over {arguments.seconds:g} s. *n equal*, *n lower*: beside n busy processes of that priority.\n")
    loads = [f"{count} {'lower' if lower else 'equal'}" if count else "quiet" for count, lower in LOADS]
    print(f"| Part | Waiting threads | {' | '.join(loads)} |\n{'|---' * (2 + len(loads))}|")
    for setting, variables in SETTINGS.items():
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        environment = {name: value for name, value in os.environ.items() if name not in names} | variables
        command = [sys.executable, __file__, "--measure", "--seconds", str(arguments.seconds)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, encoding="utf-8", stdin=pipe, stdout=pipe) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it is warm
            rows = [beside(*load, process) for load in LOADS]
            process.kill()
        if {row["priority"] for row in rows} != {priority}:
            raise SystemExit("something changed the priority of the process that measures: measure again")
        for name in [name for name in rows[0] if name != "priority"]:
            print(f"| {name} | {setting} | " + " | ".join(f"{row[name]:.1f}" for row in rows) + " |", flush=True)


if __name__ == "__main__":
    main()
