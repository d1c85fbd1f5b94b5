"""Train a policy on tasks of your choice, and read the result.

    python examples/train_on_tasks.py
    python examples/train_on_tasks.py seed=2 num_iterations=12

With the preset `toy`; for a simulator with physics write `metaworld_quickstart` and Meta-World's tasks (`reachrl list`
shows them). Arguments are changes to the preset, as on the command line. Running it again goes on, or shows
the result.
"""

import sys
from pathlib import Path

import reachrl

RUN = Path("runs/tasks")
CHANGES = ["env.tasks=red-square,blue-square"]


def main() -> None:
    """Train, then print success before and after."""
    config = reachrl.load_config("toy", [*CHANGES, *sys.argv[1:]])
    result = reachrl.train(config, RUN)
    for mode, after in result.after.items():
        print(f"{mode}: {result.before[mode].success} before, {after.success} after")
        for task, rate in after.per_task.items():
            print(f"  {task}: {rate}")
    print(f"report: {result.report}")


if __name__ == "__main__":
    main()
