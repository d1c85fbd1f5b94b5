"""What the dense reward is worth: the same warm starts trained with different rewards, over several seeds.

    python benchmarks/quickstart.py --seeds 1 2 3 --out runs/pooled
    python benchmarks/reward_arms.py --base runs/pooled --out runs/arms --curves curves.svg

Each arm takes demonstrations, warm start and reward model from the seed's finished run and repeats its training and
its held-out evaluation with another reward; the finished run itself is the arm of its own reward. Prints successes
with Wilson 95 % intervals, pooled and by seed, differences of arms with 95 % t intervals over seeds, and draws the
learning curves.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quickstart import over_seeds, show
from reachrl.functional.stats import paired_test
from reachrl.report.formats import percent
from reachrl.report.series import moving_uniform_success
from reachrl.report.svg import Chart
from reachrl.run.atomic import write_json_atomic
from reachrl.run.metrics import read_metrics

PRESET = "metaworld_quickstart"
ARMS = {
    "sparse": ["reward.kind=task"],
    "potential": [],  # the preset's own
    "sum": ["reward.mode=sum", "reward.weight=1"],  # the paper's
    "oracle": ["reward.kind=oracle"],
}
COLOURS = {"sparse": "#5b6776", "potential": "#c9760a", "sum": "#c0392b", "oracle": "#0f8b6d"}
FIRST = 20  # iterations that say how soon an arm learns
WINDOW = 4  # iterations pooled for one point of a learning curve


def prepare(base: Path, run: Path) -> None:
    """Take over what does not depend on the reward: demonstrations, warm start, reward model, evaluation before."""
    if run.exists():
        return
    aside = run.with_name(f".{run.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "eval").mkdir(parents=True)
    for name in ("demos", "sft", "reward_model"):
        shutil.copytree(base / name, aside / name)
    shutil.copy(base / "eval" / "before.json", aside / "eval" / "before.json")
    stages = json.loads((base / "stages.json").read_text(encoding="utf-8"))
    write_json_atomic(aside / "stages.json", {name: stages[name] for name in ("demos", "sft", "reward")})
    aside.rename(run)


def run_arm(base: Path, run: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Train and evaluate one arm of one seed, unless it is done; one that was cut short continues."""
    if not overrides:
        return base
    if (run / "summary.json").exists():
        return run
    prepare(base, run)
    for stage in ("train", "eval", "report"):
        command = [sys.executable, "-m", "reachrl", stage, PRESET, f"seed={seed}", *overrides, "--run", str(run)]
        subprocess.run(command, check=True)
    return run


def pooled(summaries: Sequence[dict[str, Any]], key: str) -> str:
    """One row: pooled over seeds, then each seed's rate."""
    found = [summary[key] for summary in summaries]
    rates = ", ".join(f"{100 * each['rate']:.1f}" for each in found)
    return f"{show(sum(f['k'] for f in found), sum(f['n'] for f in found)):<40} seeds: {rates}"


def paired(runs: dict[str, list[Path]], one: str, other: str, mode: str) -> str:
    """McNemar's exact test of two arms over the same (seed, task, start)."""

    def outcomes(arm: str) -> list[bool]:
        records = [
            json.loads((run / "eval" / "after.json").read_text(encoding="utf-8"))[mode]["episodes"] for run in runs[arm]
        ]
        return [each["success"] for record in records for each in sorted(record, key=lambda e: (e["task"], e["start"]))]

    test = paired_test(outcomes(one), outcomes(other))
    return f"{other} against {one}: {test.improved} better, {test.worsened} worse, p = {test.p_value:.2g}"


def draw(
    runs: dict[str, list[Path]], path: Path, colours: dict[str, str] = COLOURS, title: str = "Learning curves by reward"
) -> None:
    """Training success of each arm weighed to a uniform draw, over seeds and iterations, with Wilson intervals."""
    curves = {}
    for arm, folders in runs.items():
        records = [read_metrics(folder / "metrics.jsonl", "train") for folder in folders]
        iterations = range(min(len(r) for r in records))
        # Each seed in turn: a window of as many records holds the same iterations of all of them.
        in_turn = [seed[i] for i in iterations for seed in records]
        curves[arm] = moving_uniform_success(in_turn, WINDOW * len(records))[len(records) - 1 :: len(records)]
    last = max(x for points in curves.values() for x, *_ in points)
    chart = Chart(
        (0, last), (0, 1), width=900, height=420, margin=(22, 150, 42, 52), x_label="iteration",
        y_label="success_uniform of training episodes", y_format=percent, title=title,
    )  # fmt: skip
    for arm, points in curves.items():
        band = [(chart.x(x), chart.y(high)) for x, _, _, high in points]
        band += [(chart.x(x), chart.y(low)) for x, _, low, _ in reversed(points)]
        outline = " ".join(f"{x},{y}" for x, y in band)
        chart.add(f'<polygon points="{outline}" fill="{colours[arm]}" fill-opacity="0.15"/>')
        line = "L".join(f"{chart.x(x)} {chart.y(y)}" for x, y, *_ in points)
        chart.add(f'<path d="M{line}" fill="none" stroke="{colours[arm]}" stroke-width="2"/>')
    height = float("-inf")
    for arm in sorted(curves, key=lambda arm: -curves[arm][-1][1]):  # from above, names kept apart
        height = max(chart.y(curves[arm][-1][1]) + 4, height + 15)
        chart.add(
            f'<text x="{chart.x(last) + 8}" y="{height}" style="fill:{colours[arm]};font-weight:600">{arm}</text>'
        )
    path.write_text(chart.document(), encoding="utf-8")


def main() -> None:
    """Run, pool, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("runs/pooled"), help="finished quickstarts, seedN each")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--curves", type=Path, help="write the learning curves to this SVG file")
    arguments = parser.parse_args()
    runs: dict[str, list[Path]] = {}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            base, run = arguments.base / f"seed{seed}", arguments.out / arm / f"seed{seed}"
            runs.setdefault(arm, []).append(run_arm(base, run, seed, ARMS[arm]))
    summaries = {
        arm: [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in found]
        for arm, found in runs.items()
    }
    for mode in ("sampled", "greedy"):
        print(f"\n{mode}, held-out starts")
        print(f"  {'before':<10} {pooled(next(iter(summaries.values())), f'success_before_{mode}')}")
        for arm, found in summaries.items():
            print(f"  {arm:<10} {pooled(found, f'success_after_{mode}')}")
        for one, other in itertools.combinations(summaries, 2):
            rates = ([s[f"success_after_{mode}"]["rate"] for s in summaries[arm]] for arm in (one, other))
            differences = [100 * (after - before) for before, after in zip(*rates, strict=True)]
            print(f"  {other} less {one}, points {over_seeds(differences)}")
            print(f"  {paired(runs, one, other, mode)} (these policies on these starts; says nothing of other seeds)")
    print(f"\ntraining episodes, first {FIRST} iterations")
    for arm, found in runs.items():
        records = [r for run in found for r in read_metrics(run / "metrics.jsonl", "train") if r["iteration"] < FIRST]
        weight = sum(r["success_uniform_weight"] for r in records)
        uniform = sum(r["success_uniform"] * r["success_uniform_weight"] for r in records) / weight
        raw = show(sum(r["success_k"] for r in records), sum(r["success_n"] for r in records))
        print(f"  {arm:<10} {raw} as drawn, {100 * uniform:.1f} % weighed to a uniform draw")
    if arguments.curves:
        draw(runs, arguments.curves)


if __name__ == "__main__":
    main()
