"""How well Meta-World's scripted experts do when each decision is held: the table to choose tasks from.

    python benchmarks/experts.py > docs/benchmarks/metaworld_experts.md

Training starts only; evaluation starts are not looked at.
"""

import argparse
import sys
import warnings

import numpy as np

from reachrl.config.env import MetaworldConfig
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.envs.metaworld import MetaworldEnv
from reachrl.types import Start


def expert_episode(env: MetaworldEnv, start: Start) -> tuple[bool, int, float]:
    """Success, decisions, and the share of action components beyond 99 % of their range, in one episode."""
    env.reset(options={"start": start})
    actions = []
    while True:
        actions.append(env.expert_action())
        _, _, terminated, truncated, _ = env.step(actions[-1])
        if terminated or truncated:
            return terminated, len(actions), float((np.abs(actions) > 0.99).mean())


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--action-repeat", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # experts ask for more than the action range; clipping is expected
    config = MetaworldConfig(
        tasks=tuple(INSTRUCTIONS),
        image_size=32,
        max_steps=arguments.max_steps,
        action_repeat=arguments.action_repeat,
    )
    command = "python benchmarks/experts.py " + " ".join(sys.argv[1:])
    print("# Meta-World's scripted experts under held decisions\n")
    print(f"`{command.strip()}`: each decision held for {config.action_repeat} simulator steps, ", end="")
    print(f"at most {config.max_steps} decisions, training starts 0..{arguments.starts - 1} of each task.\n")
    print("Decisions count successful episodes only; saturated is the share of action components at their limit.\n")
    print("| Task | Instruction | Success | Decisions: mean (longest) | Saturated |\n|---|---|---|---|---|")
    for task in INSTRUCTIONS:
        env = MetaworldEnv(config)
        outcomes = [expert_episode(env, Start(task, "train", index)) for index in range(arguments.starts)]
        env.close()
        lengths = [steps for success, steps, _ in outcomes if success]
        length = f"{np.mean(lengths):.1f} ({max(lengths)})" if lengths else "–"
        saturated = np.mean([share for *_, share in outcomes])
        row = (task, INSTRUCTIONS[task], f"{len(lengths)}/{len(outcomes)}", length, f"{saturated:.0%}")
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
