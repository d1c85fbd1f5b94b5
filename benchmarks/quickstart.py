"""The published figure: the quickstart over several seeds, pooled.

    python benchmarks/quickstart.py --seeds 1 2 3 --out runs/pooled [key=value ...]

Runs what is not there yet (a run that was cut short continues), then prints for each seed and pooled over seeds
the held-out success before and after with Wilson 95 % intervals, wall time and peak memory. Pooling counts
episodes, and those of one seed share one policy: the gain stands with a 95 % t interval over the seeds, too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reachrl.functional.stats import seed_interval, wilson
from reachrl.run.metrics import read_metrics


def show(k: int, n: int) -> str:
    """`k/n` with rate and interval in per cent."""
    low, high = wilson(k, n)
    return f"{k}/{n} = {100 * k / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def over_seeds(points: Sequence[float]) -> str:
    """Figures of one run each, their mean and its 95 % t interval."""
    mean, low, high = seed_interval(points)
    each = ", ".join(f"{point:+.1f}" for point in points)
    return f"by seed {each}: {mean:+.1f} [{low:+.1f}, {high:+.1f}] over seeds"


def collecting_speed(run: Path) -> float:
    """Decisions per second of the median iteration's rollout, policy and simulators together."""
    records = read_metrics(run / "metrics.jsonl", "train")
    steps = [record["env_steps"] for record in records]
    taken = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    return statistics.median(n / record["seconds/rollout"] for n, record in zip(taken, records, strict=True))


def main() -> None:
    """Run and pool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--preset", default="metaworld_quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/pooled"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    summaries = []
    for seed in arguments.seeds:
        run = arguments.out / f"seed{seed}"
        if not (run / "summary.json").exists():
            command = [sys.executable, "-m", "reachrl", "quickstart", arguments.preset, f"seed={seed}"]
            subprocess.run([*command, *arguments.overrides, "--run", str(run)], check=True)
        summaries.append(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    hashes = {summary["protocol_hash"] for summary in summaries}
    if len(hashes) != 1:
        raise SystemExit(f"the runs follow different protocols ({', '.join(sorted(hashes))}); they cannot be pooled")
    modes = [key.removeprefix("success_before_") for key in summaries[0] if key.startswith("success_before_")]
    print(f"protocol {hashes.pop()}, config {summaries[0]['config_hash']} (seed {arguments.seeds[0]})")
    for mode in modes:
        print(f"\n{mode}")
        pooled = []
        for when in ("before", "after"):
            found = [summary[f"success_{when}_{mode}"] for summary in summaries]
            k, n = sum(f["k"] for f in found), sum(f["n"] for f in found)
            pooled.append((k, n))
            seeds = ", ".join(f"{100 * f['rate']:.1f}" for f in found)
            print(f"  {when:<7}{show(k, n):<34} seeds: {seeds}")
        (k0, n0), (k1, n1) = pooled
        apart = "apart" if wilson(k0, n0)[1] < wilson(k1, n1)[0] else "overlapping"
        print(f"  gain   {100 * (k1 / n1 - k0 / n0):+.1f} points, intervals of the episodes {apart}")
        gains = [100 * (s[f"success_after_{mode}"]["rate"] - s[f"success_before_{mode}"]["rate"]) for s in summaries]
        print(f"         {over_seeds(gains)}")
    print("\nwall clock and memory")
    for seed, summary in zip(arguments.seeds, summaries, strict=True):
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["wall_s"].items() if name != "total")
        speed = collecting_speed(arguments.out / f"seed{seed}")
        minutes, gib = summary["wall_s"]["total"] / 60, summary["peak_rss_bytes"] / 2**30
        print(f"  seed {seed}: {minutes:.1f} min ({stages} s), {gib:.2f} GiB, {summary['num_env_steps']} decisions")
        print(f"          collecting with the policy in the loop: {speed:.0f} decisions/s (median iteration)")


if __name__ == "__main__":
    main()
