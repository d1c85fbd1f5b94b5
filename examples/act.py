"""Act with a trained policy in a loop of your own.

    python examples/train_on_tasks.py
    python examples/act.py

`predict` takes a frame u8[H W 3] of any size and the task in words; here they come from the toy environment, on a robot
from a camera.
"""

import sys
from pathlib import Path

import reachrl
from reachrl.registry import build
from reachrl.types import Start

RUN = Path("runs/tasks")


def main() -> None:
    """Play one held-out episode."""
    policy = reachrl.load_policy(RUN)
    config = reachrl.load_config(str(RUN / "config.json"), sys.argv[1:])
    env = build("envs", config.env)
    task = env.tasks[0]
    observation, _ = env.reset(options={"start": Start(task, "eval", 0)})
    for step in range(1, config.env.max_steps + 1):
        actions = policy.predict(images=observation["images"], instruction=env.instruction(task))
        observation, _, terminated, truncated, info = env.step(actions[0])
        if terminated or truncated:
            print(f"{task}: {'success' if info['success'] else 'failure'} after {step} decisions")
            return


if __name__ == "__main__":
    main()
