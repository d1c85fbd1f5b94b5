"""Stages `demos` and `sft`: expert demonstrations, then supervised fine-tuning on them."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from reachrl.backends.policy_loading import new_policy
from reachrl.config.policy import PrismaticConfig
from reachrl.config.train import TrainConfig
from reachrl.demos.collect import CollectProgress, collect_demos
from reachrl.demos.sft import train_sft
from reachrl.demos.store import TrajectoryStore
from reachrl.envs.batch import is_batched
from reachrl.errors import ConfigError
from reachrl.pipeline.base import Display, StageProgress
from reachrl.policies.observed import check_shown
from reachrl.registry import resolve
from reachrl.run.directory import Run


def run_demos(config: TrainConfig, run: Run, display: Display) -> dict[str, Any]:
    """Collect demonstrations on training starts into `demos/`, if a later stage reads them.

    Raises:
        ConfigError: the simulator has no scripted expert, or its expert keeps failing.
    """
    if not needs_demos(config):
        display.log("demos: nothing to collect, the policy is kept as it is and no reward model is fitted")
        return {"trajectories": 0}
    if is_batched(resolve("envs", config.env.kind)):
        raise ConfigError(
            f"env.kind={config.env.kind} steps many worlds at once and has no scripted expert to demonstrate with. "
            "Begin with a policy that acts already: policy.checkpoint=FOLDER sft.epochs=0 and a reward without a fit, "
            "such as reward.kind=task"
        )
    total = len(config.env.tasks) * config.demos.episodes_per_task
    done = 0
    with display.stage("demos", total, "scripted experts") as progress:

        def show(event: CollectProgress) -> None:
            nonlocal done
            progress.advance(event.total_kept - done, task=event.task)
            done = event.total_kept

        store = collect_demos(
            config.env, config.demos, run.demos, seed=config.seed, on_progress=show, check=partial(_check_fit, config)
        )
    run.metrics.truncate_after("demos", "iteration", -1)  # of an attempt that was cut short here
    run.log({"kind": "demos", "iteration": 0} | outline(store))
    return {"trajectories": len(store)}


def _check_fit(config: TrainConfig, shown: Mapping[str, Any]) -> None:
    """Refuse demonstrations that the configured policy cannot learn from, before the first is played."""
    policy = config.policy
    if getattr(policy, "checkpoint", None) is not None:
        return  # it may be another than the section says
    if isinstance(policy, PrismaticConfig):
        policy.check_action_dim(shown["action_dim"], config.env.kind)
    needs = getattr(policy, "num_cameras", 1), getattr(policy, "state_size", None)
    kind = str(policy.kind)  # pyright: ignore[reportAttributeAccessIssue]
    check_shown(f"policy.kind={kind}", *needs, shown["cameras"], shown["state_size"])


def outline(store: TrajectoryStore) -> dict[str, Any]:
    """What episodes of the policy are compared with: number and length of the experts', opening of their gripper.

    `gripper/early` is as in training records: the opening after the third decision.
    """
    states = list(store.hand_states())
    lengths = [len(state) - 1 for state in states]
    early = [float(state[3, 3]) for state in states if len(state) > 3]
    return {
        "trajectories": len(states),
        "length_mean": float(np.mean(lengths)),
        "length_max": max(lengths),
        "gripper/early": float(np.mean(early)) if early else None,
    }


def needs_demos(config: TrainConfig) -> bool:
    """Whether a later stage reads demonstrations."""
    return config.fine_tunes or config.fits_reward_model


def run_sft(config: TrainConfig, run: Run, display: Display) -> dict[str, Any]:
    """Warm-start the policy on the demonstrations; the best weights are written to `sft/policy/`."""
    policy = new_policy(config)
    if not config.fine_tunes:
        display.log("sft: nothing to fit, the policy is kept as it is, its critic too")
        policy.save_pretrained(run.sft / "policy")
        return {"steps": 0}
    shown: list[StageProgress] = []
    with ExitStack() as stack:

        def begin(done: int, total: int) -> None:
            # Steps after the checkpoint that a killed training resumes from come again.
            run.metrics.truncate_after("sft", "step", done)
            stage = display.stage("sft", total, "next-token loss of action tokens", completed=done)
            shown.append(stack.enter_context(stage))

        def show(record: dict[str, Any]) -> None:
            run.log({"kind": "sft"} | record)
            shown[0].advance(1, **{key: value for key, value in record.items() if key.endswith("loss")})

        result = train_sft(
            policy, run.demos, config.sft, seed=config.seed, folder=run.sft, on_step=show, on_start=begin
        )
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "best_heldout_loss": result.best_heldout_loss,
        "token_accuracy": result.token_accuracy,
    }
