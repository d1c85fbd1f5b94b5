"""Evaluate two policies on the same held-out starts, with intervals, and test whether they differ.

    python examples/train_on_tasks.py
    python examples/compare_policies.py eval.num_starts=30

Here the warm-started and the trained policy of one run; any two that `reachrl.load_policy` reads will do.
"""

import sys
from pathlib import Path

import reachrl

RUN = Path("runs/tasks")


def main() -> None:
    """Print both success rates and the paired test."""
    config = reachrl.load_config(str(RUN / "config.json"), sys.argv[1:])
    before = reachrl.evaluate(RUN / "sft" / "policy", config, mode="greedy")
    after = reachrl.evaluate(RUN / "policy", config, mode="greedy")
    test = before.compare(after)
    print(f"before: {before.success}\nafter:  {after.success}")
    print(f"{test.improved} starts improved, {test.worsened} worsened, McNemar p = {test.p_value:.3g}")


if __name__ == "__main__":
    main()
