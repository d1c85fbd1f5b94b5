"""Why a greedy policy fails where the same policy sampled succeeds: does its arm come to rest?

    python benchmarks/greedy.py runs/quickstart --starts 25

Plays held-out starts five ways: greedily, sampled at temperature 1, by the mean of each token's distribution, greedily
with one sampled decision wherever the hand has rested, and by the mean of sixteen samples, which has a quarter of the
noise. They say whether failing comes of acting without noise or of the argmax. A failed episode rests if the hand stays
within some millimetres over its last decisions. How likely the likeliest action is at temperature 1 says how much of
the policy the argmax stands for.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reachrl
from reachrl.config.loading import validate
from reachrl.config.train import TrainConfig
from reachrl.envs.base import Env
from reachrl.functional.stats import paired_test, wilson
from reachrl.policies.answers import ActionSample
from reachrl.policies.base import Policy
from reachrl.policies.observed import one_observation
from reachrl.registry import resolve
from reachrl.run.atomic import write_bytes_atomic
from reachrl.run.configuration import read_config
from reachrl.types import Observation, Start

WAYS = ("greedy", "sampled", "mean", "greedy, sampled once at rest", "mean of 16 samples")
SAMPLES = 16
WINDOW = 10  # decisions
STILL_M = 0.005  # a hand that stays within this over the window rests


@dataclass
class Episode:
    """What was seen of one episode."""

    success: bool = False
    hands: list[np.ndarray] = field(default_factory=list)
    """Position of the hand at each decision, metres, f32[3]."""
    likeliest: list[float] = field(default_factory=list)
    """Probability of the likeliest action, at temperature 1."""

    def rests(self) -> bool:
        """Whether the hand has stayed where it is over the last decisions."""
        if len(self.hands) < WINDOW:
            return False
        lately = np.stack(self.hands[-WINDOW:])
        return bool(np.ptp(lately, axis=0).max() < STILL_M)


def play(env: Env, policy: Policy, start: Start, way: str) -> Episode:
    """One episode."""
    episode = Episode()
    rng = np.random.default_rng([start.index, *start.task.encode()])
    observed, _ = env.reset(options={"start": start})
    said, last_sampled, over = env.instruction(start.task), -WINDOW, False
    while not over:
        episode.hands.append(observed["ee_state"][:3].copy())
        state = observed["state"] if policy.state_size else None
        shown = one_observation(
            observed["images"], said, state, num_cameras=policy.num_cameras, state_size=policy.state_size
        )
        likeliest = _act(policy, shown, None)
        episode.likeliest.append(float(likeliest.logprobs.sum().exp()))
        rested = episode.rests() and len(episode.hands) - last_sampled >= WINDOW
        if way == "mean":
            actions = policy.actions(policy.act(policy.encode(shown), mean=True, with_values=False))[0]
        elif way == WAYS[4]:
            actions = policy.actions(_act(policy, shown, rng, SAMPLES)).mean(axis=0)
        elif way == "sampled" or (way == WAYS[3] and rested):
            actions, last_sampled = policy.actions(_act(policy, shown, rng))[0], len(episode.hands)
        else:
            actions = policy.actions(likeliest)[0]
        for action in actions:
            observed, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            if over:
                episode.success = bool(info["success"])
                break
    return episode


def _act(policy: Policy, shown: Observation, rng: np.random.Generator | None, rows: int = 1) -> ActionSample:
    """The likeliest tokens without a generator, else sampled ones; log-probs at temperature 1 in both cases."""

    def noise(position: int) -> torch.Tensor:
        shape = (rows, policy.num_choices)
        return torch.from_numpy((np.zeros(shape) if rng is None else rng.gumbel(size=shape)).astype(np.float32))

    inputs = policy.encode(shown).rows(torch.zeros(rows, dtype=torch.int64))
    return policy.act(inputs, temperature=1.0, noise=noise, with_values=False)


def measure(folder: Path, config: TrainConfig, count: int, ways: Sequence[str]) -> dict[str, Any]:
    """Every task and way of one saved policy."""
    policy = reachrl.load_policy(folder).eval()
    env = resolve("envs", config.env.kind)(config.env)
    found: dict[str, Any] = {}
    try:
        for task in config.env.tasks:
            starts = [Start(task, "eval", index) for index in range(count)]
            found[task] = {way: [summary(play(env, policy, start, way)) for start in starts] for way in ways}
    finally:
        env.close()
    return found


def summary(episode: Episode) -> dict[str, Any]:
    """What is kept of an episode."""
    return {
        "success": episode.success,
        "rests": not episode.success and episode.rests(),
        "decisions": len(episode.hands),
        "likeliest_at_rest": float(np.mean(episode.likeliest[-WINDOW:])),
        "likeliest": float(np.mean(episode.likeliest)),
    }


def table(found: dict[str, Any]) -> str:
    """One row for each task and way, then all tasks together."""
    lines = [
        "| Task | Actions | Success | Failures that rest | Likeliest action's probability, all decisions "
        "| the same at the end of failures that rest |",
        "|---|---|---|---|---|---|",
    ]
    for task, ways in found.items():
        lines += [_row(task, way, episodes) for way, episodes in ways.items()]
    every: dict[str, list[dict[str, Any]]] = {}
    for ways in found.values():
        for way, episodes in ways.items():
            every.setdefault(way, []).extend(episodes)
    lines += [_row("**all**", way, episodes) for way, episodes in every.items()]
    first, *others = every
    for way in others:
        test = paired_test(*([each["success"] for each in every[name]] for name in (first, way)))
        lines.append(f"\n{way} against {first}: +{test.improved} −{test.worsened}, p = {test.p_value:.2g}")
    return "\n".join(lines) + "\n"


def _row(task: str, way: str, episodes: list[dict[str, Any]]) -> str:
    k, n = sum(each["success"] for each in episodes), len(episodes)
    low, high = wilson(k, n)
    rest = [each for each in episodes if each["rests"]]
    rate = f"{k}/{n} = {100 * k / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    surely = f"{np.mean([each['likeliest_at_rest'] for each in rest]):.2f}" if rest else ""
    return (
        f"| {task} | {way} | {rate} | {len(rest)} of {n - k} "
        f"| {np.mean([each['likeliest'] for each in episodes]):.2f} | {surely} |"
    )


def main() -> None:
    """Play, print the table, keep the episodes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--policy", default="policy", help="folder in it: policy, or sft/policy for the warm start")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--starts", type=int, default=25, help="held-out starts of each task")
    parser.add_argument("--out", type=Path, help="JSON file of the episodes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = validate(read_config(arguments.run), where=str(arguments.run))
    found = measure(arguments.run / arguments.policy, config, arguments.starts, arguments.ways)
    print(table(found))
    if arguments.out:
        write_bytes_atomic(arguments.out, json.dumps(found).encode())


if __name__ == "__main__":
    main()
