"""Kills the processes of a training run one kind after the other, at random moments, and looks what becomes of the run.

    python benchmarks/kill_workers.py [--times 10] [--out FILE]

For each kind: a run on Ray with two actors, two learners with split weights and two reward workers, whose processes of
that kind get SIGKILL `--times` times, a random while after the run last went on. Every run must end by itself, and its
metrics must be those of a run that was left alone; only a killed simulator may cost the episode it was in. A learner is
killed again only when the run has gone on. The training process itself cannot go on: there the command is given again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

OPTIONS = [
    *("toy", "num_iterations=40", "checkpoint_every=2", "env.num_envs=4", "num_threads=1", "reward.weight=0.5"),
    *("backend.kind=ray", "backend.actors=2", "backend.learners=2", "backend.sharding=full"),
    *("backend.reward_workers=2", "backend.max_restarts=1000", "backend.deadline_s=60"),
]
KINDS = ("simulator", "actor", "reward worker", "learner", "training process")
STALL_S = 90.0  # longer than the deadline


def reachrl(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reachrl", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that is being written
        if record["kind"] == "train":
            found[record["iteration"]] = record
    return [found[number] for number in sorted(found)]


def victims(root: psutil.Process, kind: str) -> list[psutil.Process]:
    if kind == "training process":
        return [root]
    found = []
    for process in root.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        wanted = {
            "simulator": "reachrl.envs.worker" in title,
            "actor": title.startswith("ray::ActorProcess"),
            "reward worker": title.startswith("ray::RewardProcess"),
            "learner": title.startswith("ray::LearnerProcess"),
        }
        if wanted[kind]:
            found.append(process)
    return found


def torment(folder: Path, kind: str, times: int, rng: random.Random) -> dict:
    """Kill until `times` is reached or the run ends; how often, and the longest standstill."""
    kills, slowest, attempts, count_then = 0, 0.0, 1, -1
    process = reachrl("train", *OPTIONS, "--run", str(folder))
    seen, moved, wait = -1, time.monotonic(), rng.uniform(0.0, 3.0)
    while process.poll() is None:
        time.sleep(0.02)
        count = (
            sum(1 for _ in open(folder / "metrics.jsonl", encoding="utf-8"))
            if (folder / "metrics.jsonl").exists()
            else 0
        )
        now = time.monotonic()
        if count != seen:
            slowest = max(slowest, now - moved) if seen >= 0 else 0.0
            seen, moved = count, now
        if now - moved > STALL_S:
            process.kill()
            raise SystemExit(f"{kind}: the run stands still for {STALL_S:g} s after {kills} kills")
        # New learners need longer than the pause: they are killed when they have done something.
        recovered = count > count_then or not kind.startswith("learner")
        if kills < times and count and recovered and (wait := wait - 0.02) <= 0:
            try:
                found = victims(psutil.Process(process.pid), kind)
            except psutil.Error:
                break
            if found:
                os.kill(rng.choice(found).pid, signal.SIGKILL)
                kills, wait, count_then = kills + 1, rng.uniform(0.2, 4.0), count
                if kind == "training process":
                    process.communicate()
                    process, attempts, seen = reachrl("train", *OPTIONS, "--run", str(folder)), attempts + 1, -1
                    moved = time.monotonic()
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{kind}: the run ended with {process.returncode} after {kills} kills:\n{said[-3000:]}")
    return {"kills": kills, "standstill_s": round(slowest, 1), "attempts": attempts}


def differences(alone: list[dict], disturbed: list[dict]) -> tuple[int, float]:
    """Iterations that are missing, and the largest relative difference of a loss or a rate."""
    worst = 0.0
    for one, other in zip(alone, disturbed, strict=False):
        for name in ("success_k", "success_n", "env_steps", "loss/value", "loss/policy", "grad_norm", "reward/process"):
            a, b = one[name] or 0, other[name] or 0  # null where the policy took no step
            worst = max(worst, abs(a - b) / (abs(a) + 1e-6))
    return abs(len(alone) - len(disturbed)), worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="kill-"))
    warm = root / "warm"
    for stage in (["demos"], ["sft"], ["reward", "fit"]):
        said, _ = (process := reachrl(*stage, *OPTIONS, "--run", str(warm))).communicate()
        assert process.returncode == 0, said
    shutil.copytree(warm, root / "alone")
    torment(root / "alone", "actor", 0, rng)
    alone, table = records(root / "alone"), []
    for kind in options.kinds:
        total = {"kind": kind, "kills": 0, "runs": 0, "standstill_s": 0.0, "missing": 0, "difference": 0.0}
        while total["kills"] < options.times:
            folder = root / f"{kind.replace(' ', '-')}-{total['runs']}"
            shutil.copytree(warm, folder)
            outcome = torment(folder, kind, options.times - total["kills"], rng)
            missing, worst = differences(alone, records(folder))
            total["kills"] += outcome["kills"]
            total["runs"] += 1
            total["standstill_s"] = max(total["standstill_s"], outcome["standstill_s"])
            total["missing"] += missing
            total["difference"] = max(total["difference"], worst)
        last = records(folder)[-1]
        total |= {"lost_episodes": last["lost_episodes"], "redone": last["redone_rollouts"]}
        table.append(total)
        print(json.dumps(total), flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=2), encoding="utf-8")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
