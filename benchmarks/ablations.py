"""The paper's ablations and ours: the same warm starts trained with one option changed, over several seeds.

    python benchmarks/ablations.py --seeds 1 2 3 4 5 --out runs/ablations
    python benchmarks/ablations.py --arms full no-process-reward --story cheap --jobs 2
    python benchmarks/ablations.py --page-only

The arm `full` runs the whole story once for each seed; every other arm begins from its demonstrations, warm start and
reward model (`reachrl train --from`), and so differs in training alone, unless the policy itself is another. What is
finished is kept, what was cut short goes on, and `--jobs` runs stand side by side at low priority. The page has a row
for each arm and seed, the arms' means with 95 % t intervals over seeds, differences from `full` of runs that share a
seed, and the learning curves.

A cheaper story (`--story cheap`) asks the same of fewer tasks and iterations. Its ranking says something of the full
story only where both were run: name such arms before you trust it with the others.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart import show
from reachrl.config.loading import load_config
from reachrl.functional.stats import seed_interval
from reachrl.run.atomic import write_bytes_atomic
from reachrl.run.cores import available_cores
from reachrl.run.metrics import read_metrics
from reward_arms import draw

ROOT = Path(__file__).parents[1]
_NICENESS = 10


@dataclass(frozen=True)
class Arm:
    """One change to training."""

    overrides: tuple[str, ...]
    colour: str
    claim: str  # what the paper, or we, expect of it
    seeds: int = 5  # that its row needs
    own_warm_start: bool = False  # another policy cannot begin from that of `full`


SUM = ("reward.mode=sum", "reward.weight=1.0")
# Another kind of algorithm begins with its own defaults: the preset's step sizes are restated. Potentials of one start
# add up to the same in every episode of its group, so the process reward would change nothing.
GROUPS = (
    "reward.kind=task",
    "algorithm.lr=8e-5",
    "algorithm.lr_warmup_iterations=3",
    "algorithm.epochs=1",
    "algorithm.ratio_level=action",
    "algorithm.clip_eps_high=0.28",
    "algorithm.target_kl=0.0125",
    "algorithm.max_rollouts=1",
)
TEN_TIMES = "algorithm.lr=10 times the preset's"
ARMS = {
    "full": Arm((), "#0f8b6d", "the story as it is"),
    "no-process-reward": Arm(("reward.kind=task",), "#5b6776", "paper: worse without the process reward"),
    "sum-steps": Arm((*SUM, "reward.pay=steps"), "#999999", "the paper's sum over every decision: destroys", 3),
    "sum-segments": Arm((*SUM, "reward.pay=segments"), "#795548", "the sum at the ends of gripper segments", 3),
    "sum-keyframes": Arm((*SUM, "reward.pay=keyframes"), "#009688", "the sum, once for each keyframe reached", 3),
    "sum-tenth": Arm((*SUM[:1], "reward.weight=0.1"), "#3f51b5", "the sum over every decision at a tenth", 3),
    "uniform-curriculum": Arm(("curriculum.kind=uniform",), "#c9760a", "paper: worse with uniform sampling"),
    "printed-curriculum": Arm(("curriculum.weighting=paper",), "#8e5ea2", "paper: the weight as it is printed"),
    "temperature-1.5": Arm(("rollout.temperature=1.5",), "#17becf", "paper: better than 1.0, which `full` has"),
    "warm-up-0": Arm(("algorithm.warmup_iterations=0",), "#c0392b", "paper: worse without critic warm-up"),
    "warm-up-5": Arm(("algorithm.warmup_iterations=5",), "#7f8c8d", "paper: its own setting"),
    "lr-x10": Arm((TEN_TIMES,), "#e377c2", "paper: ten times the rate destroys the policy"),
    "clip-symmetric": Arm(("algorithm.clip_eps_high=0.2",), "#bcbd22", "ours: no better than 0.2/0.28", 3),
    "separate-critic": Arm(("policy.critic=separate",), "#2c3e50", "ours: no better than the shared one", 3, True),
    "grpo": Arm(("algorithm.kind=grpo", *GROUPS), "#673ab7", "ours: GRPO on equal environment steps", 3),
    "rloo": Arm(("algorithm.kind=rloo", *GROUPS), "#ff9800", "ours: leave-one-out on equal environment steps", 3),
    "token-ratio": Arm(("algorithm.ratio_level=token",), "#d35400", "ours: no better than the action's ratio", 3),
}
STORIES = {
    "quickstart": ("metaworld_quickstart", ()),
    "cheap": (
        "metaworld_quickstart",
        ("env.tasks=drawer-close,faucet-open,handle-press,window-open", "num_iterations=22", "eval.num_videos=0"),
    ),
    "oft": ("metaworld_oft", ("num_iterations=33",)),  # about the quickstart's environment steps
    "toy": ("toy", ("eval.num_videos=0",)),  # for trying this program, not for its figures
}
# Rollouts of whole episodes end earlier: iterations with which groups come to the environment steps of `full`.
GROUP_OVERRIDES = {
    "quickstart": ("num_iterations=62", "algorithm.minibatch_size=256", "algorithm.micro_batch_size=256"),
    "cheap": ("num_iterations=31", "algorithm.minibatch_size=256", "algorithm.micro_batch_size=256"),
    "oft": ("num_iterations=46", "algorithm.minibatch_size=128", "algorithm.micro_batch_size=128"),
}


def run_full(preset: str, overrides: Sequence[str], run: Path, seed: int) -> None:
    """The whole story of one seed, unless it is done."""
    if not (run / "summary.json").exists():
        reachrl("quickstart", preset, f"seed={seed}", *overrides, "--run", str(run))


def run_arm(preset: str, overrides: Sequence[str], base: Path, run: Path, seed: int) -> None:
    """Training and evaluation of one arm of one seed from the warm start of `base`, unless they are done."""
    if (run / "summary.json").exists():
        return
    words = [preset, f"seed={seed}", *overrides]
    reachrl("train", *words, "--from", str(base), "--run", str(run))
    for stage in ("eval", "report"):
        reachrl(stage, *words, "--run", str(run))


def reachrl(*words: str) -> None:
    """Run one command of the package, quietly; raise where it fails."""
    command = ["nice", "-n", str(_NICENESS), sys.executable, "-m", "reachrl", *words, "--quiet"]
    subprocess.run(command, check=True)


def overrides_of(arm: str, story: str) -> list[str]:
    """What an arm's runs change of the story's preset."""
    preset, common = STORIES[story]
    tenfold = f"algorithm.lr={10 * load_config(preset).algorithm.lr:g}"  # pyright: ignore[reportAttributeAccessIssue]
    own = (tenfold if each == TEN_TIMES else each for each in ARMS[arm].overrides)
    return [*common, *own, *(GROUP_OVERRIDES.get(story, ()) if arm in ("grpo", "rloo") else ())]


def run_missing(arms: Sequence[str], story: str, seeds: Sequence[int], out: Path, jobs: int) -> dict[str, list[str]]:
    """Run what is not there yet; the runs that failed, by arm, with the reason."""
    preset, common = STORIES[story]
    changes = {arm: overrides_of(arm, story) for arm in arms}
    for arm in arms:
        if arm != "full" and load_config(preset, changes[arm]) == load_config(preset, common):
            raise SystemExit(f"--arms {arm}: {', '.join(ARMS[arm].overrides)} is what {preset} has: it changes nothing")
    failed: dict[str, list[str]] = {}

    def one(arm: str, seed: int) -> None:
        base, run = out / story / "full" / f"seed{seed}", out / story / arm / f"seed{seed}"
        overrides = changes[arm]
        if arm == "full" or ARMS[arm].own_warm_start:
            run_full(preset, overrides, run, seed)
        else:
            run_arm(preset, overrides, base, run, seed)

    # An arm needs the warm start of its seed: all of those first.
    for stage in (["full"], [arm for arm in arms if arm != "full"]):
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            work = {pool.submit(one, arm, seed): (arm, seed) for seed in seeds for arm in stage}
            for done in concurrent.futures.as_completed(work):
                arm, seed = work[done]
                if (error := done.exception()) is not None:  # an arm may well diverge: that is its result
                    failed.setdefault(arm, []).append(f"seed {seed}: {error}")
    return failed


def summaries(arm: str, story: str, out: Path) -> dict[int, dict[str, Any]]:
    """What the finished runs of an arm came to, by seed."""
    found = sorted((out / story / arm).glob("seed*/summary.json"), key=lambda path: int(path.parent.name[4:]))
    return {int(path.parent.name[4:]): json.loads(path.read_text(encoding="utf-8")) for path in found}


def page(arms: Sequence[str], story: str, out: Path, picture: str, failed: dict[str, list[str]]) -> str:
    """The page about the finished runs: the arms, then each run."""
    found = {arm: runs for arm in arms if (runs := summaries(arm, story, out))}
    preset, common = STORIES[story]
    hashes = {run["protocol_hash"] for runs in found.values() for run in runs.values()}
    if len(hashes) > 1:
        raise SystemExit(f"the runs follow different protocols ({', '.join(sorted(hashes))}); they cannot be compared")
    text = [
        "# Ablations",
        "",
        f"Written by `benchmarks/ablations.py` from finished runs of the story `{story}`: preset `{preset}`"
        + (f" with {', '.join(f'`{each}`' for each in common)}" if common else "")
        + f", protocol `{next(iter(hashes), 'none')}`. Each arm begins from the warm start and reward model of `full` "
        "of its seed and changes training alone. Rates are held-out success of the last weights at the headline's "
        "temperature; intervals over seeds are 95 % t intervals, and a difference is that of runs which share a seed. "
        "An arm is called better or worse only where the interval of its difference lies on one side of 0, over all "
        f"of the seeds that its row needs. {made_by(sorted((out / story).glob('*/seed*')))} Minutes are beside other "
        "work.",
        "",
        "| Arm | Changes | Expected | Seeds | Before, pooled | After, pooled | Mean over seeds, points "
        "| Less `full`, points | Says |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    text += [_arm_row(arm, story, runs, found.get("full", {})) for arm, runs in found.items()]
    text += [
        f"| {arm} | {_changes(arm, story)} | {ARMS[arm].claim} | 0 | | not run | | | untested |"
        for arm in arms
        if arm not in found
    ]
    text += [
        "",
        "## Each run",
        "",
        "| Arm | Seed | Before | After | Other temperatures after | Environment steps | Minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    text += [_run_row(arm, seed, run) for arm, runs in found.items() for seed, run in runs.items()]
    if any(runs for runs in found.values()):
        text += ["", "## Learning curves", "", f"![Learning curves by arm]({picture})", ""]
        text += [
            "`success_uniform` of training episodes, pooled over seeds and four iterations, with Wilson intervals."
        ]
    if failed:
        text += ["", "## Runs that did not end", ""]
        text += [f"- {arm}, {each}" for arm, problems in failed.items() for each in problems]
    return "\n".join(text) + "\n"


def made_by(folders: Iterable[Path]) -> str:
    """The commits and the machines of some runs, as a sentence; empty where none says it."""
    files = [path for folder in folders if (path := folder / "provenance.json").exists()]
    made = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    commits = sorted({str(each["commit"])[:7] + (" (changed)" if each["dirty"] else "") for each in made})
    machines = sorted({f"{each['cores']} cores of {each['cpu']}" for each in made})
    return f"Trained at commit {', '.join(commits)} on {', '.join(machines)}." if made else ""


def _arm_row(arm: str, story: str, runs: dict[int, dict[str, Any]], full: dict[int, dict[str, Any]]) -> str:
    after = {seed: run["success_after"] for seed, run in runs.items()}
    mean = points([100 * each["rate"] for each in after.values()], signed=False)
    shared = [seed for seed in after if seed in full and arm != "full"]
    less = [100 * (after[seed]["rate"] - full[seed]["success_after"]["rate"]) for seed in shared]
    before, trained = (pooled([run[key] for run in runs.values()]) for key in ("success_before", "success_after"))
    says = _verdict(less, ARMS[arm].seeds) if less else ""
    return (
        f"| {arm} | {_changes(arm, story)} | {ARMS[arm].claim} | {len(runs)} | {before} | {trained} | {mean} "
        f"| {points(less)} | {says} |"
    )


def pooled(rates: Sequence[dict[str, Any]]) -> str:
    """The rate of all episodes of some runs together, with its interval."""
    return show(sum(each["k"] for each in rates), sum(each["n"] for each in rates))


def _changes(arm: str, story: str) -> str:
    overrides = (*ARMS[arm].overrides, *(GROUP_OVERRIDES.get(story, ()) if arm in ("grpo", "rloo") else ()))
    return ", ".join(f"`{each}`" for each in overrides) or "nothing"


def points(values: Sequence[float], *, signed: bool = True) -> str:
    """The mean of one figure for each seed, with its 95 % t interval over seeds."""
    if not values:
        return ""
    mean, low, high = seed_interval(values)
    form = "{:+.1f}" if signed else "{:.1f}"
    return form.format(mean) + (f" [{form.format(low)}, {form.format(high)}]" if len(values) > 1 else " (one seed)")


def _verdict(less: Sequence[float], needed: int) -> str:
    if len(less) < needed:
        return f"too few seeds ({len(less)} of {needed})"
    _, low, high = seed_interval(less)
    return "worse" if high < 0 else "better" if low > 0 else "not told apart"


def _run_row(arm: str, seed: int, run: dict[str, Any]) -> str:
    def rate(found: dict[str, Any]) -> str:
        return f"{found['k']}/{found['n']} = {100 * found['rate']:.1f} %"

    others = [each["mode"] for each in run["temperatures"] if each["mode"] != run["mode"]]
    beside = ", ".join(f"{mode} {rate(run[f'success_after_{mode}'])}" for mode in others)
    if best := run.get("best"):
        rated = rate(best["success"][run["mode"]])
        beside += f"; best by validation {rated} (iteration {best['iteration']} of {best['of']})"
    return (
        f"| {arm} | {seed} | {rate(run['success_before'])} | {rate(run['success_after'])} | {beside} "
        f"| {run['num_env_steps']} | {run['wall_s']['total'] / 60:.1f} |"
    )


def _draw(arms: Sequence[str], story: str, out: Path, path: Path) -> None:
    runs = {
        arm: [out / story / arm / f"seed{seed}" for seed in found]
        for arm in arms
        if (found := summaries(arm, story, out))
    }
    drawn = {
        arm: folders
        for arm, folders in runs.items()
        if all(read_metrics(f / "metrics.jsonl", "train") for f in folders)
    }
    if drawn:
        draw(drawn, path, {arm: ARMS[arm].colour for arm in drawn}, "Learning curves by arm")


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--story", choices=list(STORIES), default="quickstart")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--jobs", type=int, default=max(1, available_cores() // 2), help="runs side by side")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction" / "ablations.md")
    parser.add_argument("--page-only", action="store_true", help="write the page about what is there; run nothing")
    arguments = parser.parse_args()
    arms = list(dict.fromkeys(["full", *arguments.arms]))
    failed: dict[str, list[str]] = {}
    if not arguments.page_only:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        failed = run_missing(arms, arguments.story, arguments.seeds, arguments.out, arguments.jobs)
    picture = arguments.page.with_suffix(".svg")
    _draw(arms, arguments.story, arguments.out, picture)
    text = page(arms, arguments.story, arguments.out, picture.name, failed)
    write_bytes_atomic(arguments.page, text.encode())
    print(f"{arguments.page}: {sum(len(summaries(arm, arguments.story, arguments.out)) for arm in arms)} runs")
    for arm, problems in failed.items():
        print(f"{arm}: {'; '.join(problems)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
