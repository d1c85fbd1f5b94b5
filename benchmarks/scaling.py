"""Success against environment steps of RL: one long run for each seed, measured on validation starts as it goes.

    python benchmarks/scaling.py --seeds 1 2 3 --out runs/ablations

Each seed's run begins from the warm start of the arm `full` of `ablations.py` and trains for four times its
iterations; every quarter of the budget of `full` it plays start states that nothing is trained on. A straight line in
the logarithm of the steps is fitted to each seed's points by least squares; the slope, and the band in the picture,
are means over seeds with 95 % t intervals. Held-out success of the last weights stands beside that of `full`.
"""

import argparse
import concurrent.futures
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablations import ROOT, STORIES, made_by, pooled, run_arm, run_full
from quickstart import show
from reachrl.config.loading import load_config
from reachrl.functional.stats import seed_interval
from reachrl.report.formats import percent
from reachrl.report.svg import Chart
from reachrl.run.atomic import write_bytes_atomic
from reachrl.run.metrics import read_metrics

FACTOR = 4  # times the story's iterations
POINTS = 2  # measurements in each span of as many iterations as the story has
STARTS = 25  # validation starts of each task
COLOURS = ("#0f8b6d", "#c9760a", "#8e5ea2", "#1f77b4", "#c0392b")


@dataclass(frozen=True)
class Curve:
    """One seed's successes on validation starts."""

    steps: list[int]  # environment steps before each measurement, increasing
    k: list[int]
    n: int

    def line(self) -> tuple[float, float]:
        """Slope for each doubling and value at one step of the least-squares line in log2(steps)."""
        slope, intercept = np.polyfit(np.log2(self.steps), np.array(self.k) / self.n, 1)
        return float(slope), float(intercept)


def changes(story: str) -> list[str]:
    """What a long run changes of the story's preset."""
    preset, common = STORIES[story]
    iterations = load_config(preset, common).num_iterations
    during = [f"eval.during_every={iterations // POINTS}", f"eval.during_starts={STARTS}"]
    kept = [each for each in common if not each.startswith("num_iterations=")]
    return [*kept, f"num_iterations={FACTOR * iterations}", *during]


def run_missing(story: str, seeds: Sequence[int], out: Path, jobs: int) -> None:
    """Run what is not there yet; a run that was cut short goes on."""
    preset, common = STORIES[story]

    def one(seed: int) -> None:
        base = out / story / "full" / f"seed{seed}"
        run_full(preset, common, base, seed)
        run_arm(preset, changes(story), base, out / story / "long" / f"seed{seed}", seed)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, seeds))


def curve(run: Path) -> Curve:
    """The points of a run, without that of the warm start: its logarithm is that of no steps."""
    after = {line["iteration"] + 1: line["env_steps"] for line in read_metrics(run / "metrics.jsonl", "train")}
    points = [line for line in read_metrics(run / "metrics.jsonl", "validation") if line["iteration"] in after]
    points.sort(key=lambda line: line["iteration"])
    return Curve([after[line["iteration"]] for line in points], [line["k"] for line in points], points[0]["n"])


def page(story: str, out: Path, curves: dict[int, Curve], ends: dict[int, list[dict[str, Any]]], picture: str) -> str:
    """The page about finished runs."""
    preset, _ = STORIES[story]
    slopes = [100 * each.line()[0] for each in curves.values()]
    mean, low, high = seed_interval(slopes)
    text = [
        "# Success and environment steps",
        "",
        f"Written by `benchmarks/scaling.py` from runs of the story `{story}`: preset `{preset}` with "
        + ", ".join(f"`{each}`" for each in changes(story))
        + f". Each seed begins from the warm start of its run of `full` ([ablations](ablations.md)). Validation "
        f"starts, {next(iter(curves.values())).n} a point and seed, that neither training nor the last table uses; "
        f"Wilson intervals for pooled episodes, 95 % t intervals over seeds. {made_by(_folders(out, story, curves))}",
        "",
        f"**A doubling of the steps brings {mean:+.1f} points [{low:+.1f}, {high:+.1f}]** (by seed "
        f"{', '.join(f'{each:+.1f}' for each in slopes)}), in the range measured; a straight line in the logarithm.",
        "",
        f"![Success by environment steps]({picture})",
        "",
        "| Environment steps | Pooled | By seed |",
        "|---|---|---|",
    ]
    for column, steps in enumerate(next(iter(curves.values())).steps):
        found = [each.k[column] for each in curves.values()]
        total = sum(each.n for each in curves.values())
        text.append(f"| {steps:,} | {show(sum(found), total)} | {', '.join(str(k) for k in found)} |")
    text += ["", "## Held-out starts", "", "| Actions | Seed | Before RL | `full` | Four times as long |"]
    text += ["|---|---|---|---|---|"]
    modes = [each["mode"] for each in next(iter(ends.values()))[1]["temperatures"]]
    for mode in modes:
        rates = {
            seed: [full[f"success_before_{mode}"], *(each[f"success_after_{mode}"] for each in (full, long))]
            for seed, (full, long) in ends.items()
        }
        text += [
            f"| {mode} | {seed} | " + " | ".join(show(each["k"], each["n"]) for each in found) + " |"
            for seed, found in rates.items()
        ]
        columns = zip(*rates.values(), strict=True)
        text.append(f"| **{mode}** | **pooled** | " + " | ".join(f"**{pooled(each)}**" for each in columns) + " |")
    text.append("")
    for mode in modes:
        less = [
            long[f"success_after_{mode}"]["rate"] - full[f"success_after_{mode}"]["rate"]
            for full, long in ends.values()
        ]
        mean, low, high = seed_interval([100 * each for each in less])
        text.append(f"Four times as long less `full`, {mode}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}] over seeds.")
        text.append("")
    text.pop()
    return "\n".join(text) + "\n"


def _folders(out: Path, story: str, seeds: Iterable[int]) -> list[Path]:
    return [out / story / arm / f"seed{seed}" for arm in ("full", "long") for seed in seeds]


def draw(curves: dict[int, Curve]) -> str:
    """Each seed's points, and the mean of their lines with its interval, over a logarithmic axis."""
    first, last = (math.log2(next(iter(curves.values())).steps[i]) for i in (0, -1))
    chart = Chart(
        (first, last), (0, 1), width=900, height=420, margin=(22, 90, 42, 52), x_label="environment steps",
        y_label="success on validation starts", x_format=lambda x: f"{2**x / 1000:.0f}k", y_format=percent,
        title="Success by environment steps",
    )  # fmt: skip
    lines = [each.line() for each in curves.values()]
    fitted = []
    for x in np.linspace(first, last, 40).tolist():
        mean, low, high = seed_interval([slope * x + intercept for slope, intercept in lines])
        fitted.append((chart.x(x), chart.y(mean), chart.y(max(0, low)), chart.y(min(1, high))))
    if len(curves) > 1:
        band = [f"{x},{high}" for x, _, _, high in fitted] + [f"{x},{low}" for x, _, low, _ in reversed(fitted)]
        chart.add(f'<polygon points="{" ".join(band)}" fill="#5b6776" fill-opacity="0.15"/>')
    chart.add(
        f'<path d="M{"L".join(f"{x} {y}" for x, y, *_ in fitted)}" fill="none" stroke="#5b6776" stroke-width="2"/>'
    )
    for (seed, each), colour in zip(curves.items(), COLOURS, strict=False):
        for steps, k in zip(each.steps, each.k, strict=True):
            chart.add(
                f'<circle cx="{chart.x(math.log2(steps))}" cy="{chart.y(k / each.n)}" r="3.5" fill="{colour}">'
                f"<title>seed {seed}: {k}/{each.n} after {steps:,} steps</title></circle>"
            )
        y = chart.y(each.k[-1] / each.n) + 4
        chart.add(f'<text x="{chart.x(last) + 8}" y="{y}" style="fill:{colour};font-weight:600">seed {seed}</text>')
    return chart.document()


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--story", choices=list(STORIES), default="cheap")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of `ablations.py`")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction" / "scaling.md")
    parser.add_argument("--page-only", action="store_true", help="write the page about what is there; run nothing")
    arguments = parser.parse_args()
    if not arguments.page_only:
        run_missing(arguments.story, arguments.seeds, arguments.out, arguments.jobs)
    curves, ends = {}, {}
    for seed in arguments.seeds:
        long, full = (arguments.out / arguments.story / arm / f"seed{seed}" for arm in ("long", "full"))
        if not (long / "summary.json").exists():
            print(f"seed {seed}: {long} has not finished")
            continue
        curves[seed] = curve(long)
        ends[seed] = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (full, long)]
    if not curves:
        raise SystemExit("no run has finished: nothing to write")
    picture = arguments.page.with_suffix(".svg")
    picture.write_text(draw(curves), encoding="utf-8")
    write_bytes_atomic(arguments.page, page(arguments.story, arguments.out, curves, ends, picture.name).encode())
    print(f"{arguments.page}: {len(curves)} seeds")


if __name__ == "__main__":
    main()
