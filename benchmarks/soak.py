"""A long run: what grows between iteration 200 and iteration 2,000 of a small toy, and what must not.

    python benchmarks/soak.py [--iterations 2000] [--run FOLDER] [key=value ...]

Trains with the process reward, which is refitted, with evaluation during training, checkpoints and TensorBoard.
Meanwhile memory, threads, open files and shared memory of all its processes are read from /proc (Linux only). Prints a
table, the median over a window at both ends, and ends with code 1 if anything grew by more than 5 MB or by one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

OPTIONS = [
    *("toy", "checkpoint_every=10", "num_threads=1", "env.num_envs=2", "env.max_steps=12"),
    *("policy.language_model.hidden_size=32", "policy.language_model.intermediate_size=48"),
    *("demos.episodes_per_task=8", "sft.epochs=1", "rollout.num_steps=12", "algorithm.epochs=1"),
    *("reward_model.steps=20", "reward_model.rollouts_per_task=2", "reward_model.num_frames=2"),
    *("reward_model.refit_every=20", "reward_model.refit_steps=2", "reward_model.refit_window=2"),
    *("eval.during_every=40", "eval.during_starts=1", "keep_best_checkpoints=1", "eval.num_starts=2"),
]
STAGES = (["demos"], ["sft"], ["reward", "fit"])
MOST_BYTES = 5_000_000
MEGABYTES = "MB"  # the other rows are counts


def sample(root: psutil.Process, run: Path) -> dict[str, float]:
    """What the command and its processes hold now, and what lies in the run folder; megabytes and counts."""
    names = ("memory of all processes, MB", "of the training process, MB", "shared memory, MB")
    found: dict[str, float] = dict.fromkeys((*names, "processes", "threads", "open files"), 0.0)
    for process in [root, *root.children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" not in fields:
            continue  # likewise
        # Not pages of files, which the kernel takes and gives as it likes.
        anonymous = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024 / 1e6
        found["memory of all processes, MB"] += anonymous
        if process.pid == root.pid:
            found["of the training process, MB"] = anonymous
        found["shared memory, MB"] += int(fields["RssShmem"].split()[0]) * 1024 / 1e6
        found["processes"] += 1
        found["threads"] += int(fields["Threads"])
        found["open files"] += files
    found["/dev/shm, MB"] = sum(entry.stat().st_size for entry in Path("/dev/shm").rglob("*") if entry.is_file()) / 1e6
    return found | on_disk(run)


def on_disk(run: Path) -> dict[str, float]:
    """Number and size of the run folder's files, without what is appended to by each iteration."""
    sizes, appended = [], 0
    for path in run.rglob("*"):
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            continue  # a checkpoint that is written aside, or an old one that goes
        if not path.is_file():
            continue
        if path.name == "metrics.jsonl" or "tfevents" in path.name:
            appended += size
        else:
            sizes.append(size)
    return {"files in the run folder": len(sizes), "their size, MB": sum(sizes) / 1e6, "records, MB": appended / 1e6}


def iterations(run: Path) -> int:
    """How many iterations the run has finished."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def watch(process: subprocess.Popen[bytes], run: Path, every: int) -> list[dict[str, float]]:
    """A sample about every so many iterations until the command ends."""
    root, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        done = iterations(run)
        if done >= (samples[-1]["iteration"] + every if samples else 1):
            found = {"iteration": float(done)} | sample(root, run)
            if process.poll() is None:
                samples.append(found)
                print(json.dumps({name: round(value, 2) for name, value in found.items()}), file=sys.stderr, flush=True)
        time.sleep(0.2)
    return samples


def window(samples: list[dict[str, float]], name: str, first: int, last: int) -> float:
    """The median of one figure between two iterations."""
    return statistics.median(each[name] for each in samples if first <= each["iteration"] <= last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--run", type=Path, help="where the run is kept; by default a folder that is removed")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, last = arguments.run or Path(folder) / "run", arguments.iterations
        options = [*OPTIONS, f"num_iterations={last}", *arguments.overrides, "--run", str(run)]
        command = [sys.executable, "-m", "reachrl"]
        for stage in STAGES:
            subprocess.run([*command, *stage, *options], check=True, stdout=sys.stderr)
        began = time.perf_counter()
        with subprocess.Popen([*command, "train", "--quiet", *options], stdout=sys.stderr) as process:
            samples = watch(process, run, every=max(1, last // 200))
        if process.returncode:
            raise SystemExit(f"training ended with code {process.returncode}")
        seconds = time.perf_counter() - began
    low, width = last // 10, last // 20
    ends = ((low - width // 2, low + width // 2), (last - width, last))
    print(f"{last} iterations, {seconds / last:.2f} s each beside whatever else ran.\n")
    print(f"| Median around iteration | {low} | {last - width // 2} | grew by |\n|---|---|---|---|")
    failed = False
    for name in [name for name in samples[0] if name != "iteration"]:
        before, after = (window(samples, name, *end) for end in ends)
        print(f"| {name} | {before:.1f} | {after:.1f} | {after - before:+.1f} |")
        most = MOST_BYTES / 1e6 if name.endswith(MEGABYTES) else 0.5
        failed |= after - before > most and name != "records, MB"
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
