"""Does online RL make a policy more robust, and does training with perturbations? Three seeds, each axis.

    python benchmarks/randomise.py --seeds 1 2 3 --out runs/ablations

Four policies of each seed play the same held-out starts, unperturbed and under one level of each axis of
`reachrl robust`: the warm start and the trained policy of the arm `full` of `ablations.py`; the same warm start
trained with `env.randomise` on all axes; and a warm start on demonstrations with `demos.randomise` on all axes, as many
of them. Training draws values that are never evaluated. What is finished is kept, and what was cut short goes on.
"""

import argparse
import concurrent.futures
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ablations import ROOT, STORIES, made_by, points, pooled, reachrl, run_arm, run_full
from reachrl.run.atomic import write_bytes_atomic

AXES = {
    "camera": 10, "light": 1, "colour": 0.5, "texture": 0.5, "language": 1, "noise": 20, "delay": 2, "start": 0.2
}  # fmt: skip
PLAIN, ALL = "unperturbed", "all eight"
POLICIES = {
    "warm": "warm start",
    "rl": "RL",
    "rl-varied": "RL with `env.randomise`",
    "warm-varied": "warm start with `demos.randomise`",
}
QUESTIONS = {  # what is subtracted from what
    "RL less its warm start": ("rl", "warm"),
    "RL with `env.randomise` less RL without": ("rl-varied", "rl"),
    "warm start with `demos.randomise` less without": ("warm-varied", "warm"),
    "warm start with `demos.randomise` less RL without": ("warm-varied", "rl"),
}
Rates = dict[str, dict[str, int]]  # by condition: k and n
Figure = Callable[[Rates], float]  # of one policy of one seed


def folders(out: Path, story: str, seed: int) -> dict[str, Path]:
    """The folders of a seed's four policies."""
    full, rl, warm = (out / story / arm / f"seed{seed}" for arm in ("full", "rl-varied", "warm-varied"))
    return {
        "warm": full / "sft" / "policy",
        "rl": full / "policy",
        "rl-varied": rl / "policy",
        "warm-varied": warm / "sft" / "policy",
    }


def run_missing(story: str, seeds: Sequence[int], out: Path, jobs: int, episodes: int) -> None:
    """Train and measure what is not there yet."""
    preset, common = STORIES[story]
    names = ",".join(AXES)

    def one(seed: int) -> None:
        base = out / story / "full" / f"seed{seed}"
        run_full(preset, common, base, seed)
        varied = [*common, f"env.randomise.axes={names}"]
        run_arm(preset, varied, base, out / story / "rl-varied" / f"seed{seed}", seed)
        warm = out / story / "warm-varied" / f"seed{seed}"
        if not (warm / "sft" / "policy").exists():
            for stage in ("demos", "sft"):
                reachrl(stage, preset, f"seed={seed}", *common, f"demos.randomise.axes={names}", "--run", str(warm))
        for policy, folder in folders(out, story, seed).items():
            place = measured(out, story, policy, seed)
            if not (place / "robust.json").exists():
                levels = ",".join(f"{axis}={level:g}" for axis, level in AXES.items())
                words = ["--axes", levels, "--episodes", str(episodes), "--out", str(place)]
                reachrl("robust", str(folder), *words)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, seeds))


def measured(out: Path, story: str, policy: str, seed: int) -> Path:
    """Where the outcomes of a policy of a seed lie."""
    return out / story / "robust" / policy / f"seed{seed}"


def rates(place: Path) -> Rates:
    """Successes and episodes of one policy by condition."""
    found = json.loads((place / "robust.json").read_text(encoding="utf-8"))
    by_axis: dict[str, Any] = {PLAIN: found["plain"], ALL: found["perturbed"]}
    by_axis |= {each["axis"]: each for each in found["axes"]}
    return {name: {key: each["rates"]["after"][key] for key in ("k", "n")} for name, each in by_axis.items()}


def page(story: str, out: Path, found: dict[str, dict[int, Rates]], episodes: int) -> str:
    """The page about the finished seeds."""
    preset, common = STORIES[story]
    seeds = sorted(found["warm"])
    conditions = [PLAIN, ALL, *AXES]
    runs = [out / story / arm / f"seed{seed}" for arm in ("full", "rl-varied", "warm-varied") for seed in seeds]
    text = [
        "# Robustness and training",
        "",
        f"Written by `benchmarks/randomise.py` from seeds {', '.join(map(str, seeds))} of the story `{story}`: preset "
        f"`{preset}` with {', '.join(f'`{each}`' for each in common)}; {episodes} held-out starts of each task, "
        "unperturbed and under one level of each axis of [`reachrl robust`](../how-to/robustness.md), sampled "
        "actions. Half of the training episodes, or demonstrations, of the varied policies draw one of the eight axes "
        "and one of its training values, which are not evaluated. Pooled rates with Wilson intervals; differences are "
        f"of policies of one seed, in points, with 95 % t intervals over seeds. {made_by(runs)}",
        "",
        "| Condition | " + " | ".join(POLICIES.values()) + " |",
        "|---" * (1 + len(POLICIES)) + "|",
    ]
    for condition in conditions:
        cells = [pooled([each[condition] for each in found[policy].values()]) for policy in POLICIES]
        text.append(f"| {_named(condition)} | {' | '.join(cells)} |")
    plain: dict[str, Figure] = {name: partial(_percent, name) for name in conditions}
    first = {name: plain[name] for name in (PLAIN, ALL)}
    first[f"{ALL} less {PLAIN}"] = lambda rates: _percent(ALL, rates) - _percent(PLAIN, rates)
    for figures in (first, {axis: plain[axis] for axis in AXES}):
        text += ["", f"| Difference | {' | '.join(figures)} |", "|---" * (1 + len(figures)) + "|"]
        for question, (one, other) in QUESTIONS.items():
            less = [
                points([figure(found[one][seed]) - figure(found[other][seed]) for seed in seeds])
                for figure in figures.values()
            ]
            text.append(f"| {question} | {' | '.join(less)} |")
    return "\n".join(text) + "\n"


def _named(condition: str) -> str:
    return f"`{condition}`, level {AXES[condition]:g}" if condition in AXES else condition


def _percent(condition: str, rates: Rates) -> float:
    return 100 * rates[condition]["k"] / rates[condition]["n"]


def main() -> None:
    """Run what is missing, then write the page about the seeds that are whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--story", choices=list(STORIES), default="cheap")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of `ablations.py`")
    parser.add_argument("--episodes", type=int, default=25, help="held-out starts of each task")
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction" / "robust-training.md")
    parser.add_argument("--page-only", action="store_true", help="write the page about what is there; run nothing")
    given = parser.parse_args()
    if not given.page_only:
        run_missing(given.story, given.seeds, given.out, given.jobs, given.episodes)
    found: dict[str, dict[int, Rates]] = {policy: {} for policy in POLICIES}
    for seed in given.seeds:
        places = {policy: measured(given.out, given.story, policy, seed) for policy in POLICIES}
        if all((place / "robust.json").exists() for place in places.values()):
            for policy, place in places.items():
                found[policy][seed] = rates(place)
        else:
            print(f"seed {seed} is not whole yet")
    if not found["warm"]:
        raise SystemExit("no seed is whole: nothing to write")
    write_bytes_atomic(given.page, page(given.story, given.out, found, given.episodes).encode())
    print(f"{given.page}: seeds {', '.join(map(str, found['warm']))}")


if __name__ == "__main__":
    main()
