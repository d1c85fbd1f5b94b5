"""Seconds to label trajectories: segments, keyframes and the target of every frame, on one core.

    python benchmarks/labelling.py --steps 10000

The trajectories are made up: a gripper that opens and closes with some chatter and noise, and an arm that rests now
and then. Each is labelled whole (`label_trajectory`), one length a row. For scale, the same cuts and rests are also
found by loops over plain Python numbers, and must come out alike. Times are CPU seconds, so that other programs
disturb less.
"""

import argparse
import itertools
import statistics
import time

import numpy as np

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.rewards.process.label import label_trajectory
from reachrl.rewards.process.segment import segment
from reachrl.types import Start, Trajectory

CONFIG = SmallRewardModelConfig()
OPTIONS = {name: getattr(CONFIG, name) for name in ("gripper_change", "min_segment", "keyframe_speed")}


def trajectory(decisions: int, seed: int) -> Trajectory:
    """A successful trajectory whose gripper changes about every 25 decisions and whose arm rests as often."""
    rng = np.random.default_rng(seed)
    frames = decisions + 1
    opening = np.where(np.arange(frames) // 25 % 2, 0.2, 0.9) + rng.normal(0, 0.02, frames)
    flips = rng.random(frames) < 0.02
    opening[flips] = 1.1 - opening[flips]
    speed = np.where(np.arange(decisions) % 30 < 26, 0.02, 0.001) * rng.uniform(0.8, 1.2, decisions)
    xyz = np.zeros((frames, 3))
    xyz[1:] = np.cumsum(speed[:, None] * rng.dirichlet([1, 1, 1], decisions) ** 0.5, axis=0)
    return Trajectory(
        start=Start("made-up", "train", seed),
        instruction="open and close",
        actions=np.zeros((decisions, 4), np.float32),
        images={"camera": np.zeros((frames, 1, 1, 3), np.uint8)},
        ee_state=np.column_stack([xyz, opening]).astype(np.float32),
        success=True,
        source="benchmark",
    )


def cuts_by_loops(opening: list[float]) -> list[int]:
    """The cuts of the gripper without numpy, as `gripper_cuts` defines them."""
    low, high = min(opening), max(opening)
    if high - low < CONFIG.gripper_change:
        return []
    state, states = opening[0] > 0.5 * (low + high), []
    for value in opening:
        state = value > low + 0.4 * (high - low) if state else value >= low + 0.6 * (high - low)
        states.append(state)
    runs = [(key, len(list(group))) for key, group in itertools.groupby(states)]
    starts = list(itertools.accumulate((length for _, length in runs), initial=0))
    lasting = [(start, key) for start, (key, length) in zip(starts, runs, strict=False) if length >= CONFIG.min_segment]
    cuts = [b for (_, before), (b, after) in itertools.pairwise(lasting) if before != after]
    while cuts:
        levels = [statistics.median(opening[a:b]) for a, b in itertools.pairwise([0, *cuts, len(opening)])]
        steps = [abs(b - a) for a, b in itertools.pairwise(levels)]
        if min(steps) >= CONFIG.gripper_change:
            break
        del cuts[steps.index(min(steps))]
    return cuts


def rests_by_loops(xyz: list[list[float]], bounds: list[int]) -> list[int]:
    """The keyframes of a trajectory that never misses a pose, without numpy, as `rest_frames` defines them."""
    speed = [sum((b - a) ** 2 for a, b in zip(p, q, strict=True)) ** 0.5 for p, q in itertools.pairwise(xyz)]
    fast = float(np.percentile(speed, 95))
    found = []
    for first, last in itertools.pairwise(bounds):
        for slow, group in itertools.groupby(range(first, last), key=lambda t: speed[t] < CONFIG.keyframe_speed * fast):
            stretch = list(group)
            if slow and stretch[0] > first:
                found.append(min(stretch, key=lambda t: speed[t]) + 1)
    return found


def check(example: Trajectory) -> float:
    """Compare with the loops; returns the seconds they took."""
    opening, xyz = example.ee_state[:, 3].tolist(), example.ee_state[:, :3].tolist()
    began = time.process_time()
    bounds = [0, *cuts_by_loops(opening), len(opening) - 1]
    keyframes = rests_by_loops(xyz, bounds)
    seconds = time.process_time() - began
    found = segment(example.ee_state, success=False, **OPTIONS)
    assert found.bounds.tolist() == bounds, "cuts differ from the loops"
    assert found.keyframes.tolist() == keyframes, "keyframes differ from the loops"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to label trajectories.")
    parser.add_argument("--steps", type=int, default=10_000, help="decisions labelled in each row")
    parser.add_argument("--repeat", type=int, default=5, help="the best of so many")
    arguments = parser.parse_args()
    print("| decisions a trajectory | trajectories | segments a trajectory | label_trajectory (s) | loops (s) |")
    print("|---:|---:|---:|---:|---:|")
    for decisions in (50, 200, 1000, 10_000):
        examples = [trajectory(decisions, seed) for seed in range(max(1, arguments.steps // decisions))]
        times = []
        for _ in range(arguments.repeat):
            began = time.process_time()
            for example in examples:
                label_trajectory(example, CONFIG)
            times.append(time.process_time() - began)
        loops = sum(check(example) for example in examples)
        segments = statistics.mean(len(segment(e.ee_state, success=True, **OPTIONS).bounds) - 1 for e in examples)
        print(f"| {decisions} | {len(examples)} | {segments:.1f} | {min(times):.3f} | {loops:.3f} |")


if __name__ == "__main__":
    main()
