"""Three iterations on one collected batch, alone or under `torchrun`: what each process ends with.

Run by test_data_parallel.py for cases, one after the other: python data_parallel_steps.py '{OUT: [KEY=VALUE...]}'
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed
from toy_policy import toy_config, toy_policy

from reachrl import torchrun
from reachrl.backends.data_parallel import follow
from reachrl.backends.group import Group
from reachrl.backends.learner import LocalLearner
from reachrl.backends.local import LocalActors
from reachrl.config.env import EnvSection
from reachrl.envs.vector import VectorEnv
from reachrl.registry import build
from reachrl.rewards.task import TaskReward

GROUPED = {"algorithm.kind=grpo", "algorithm.kind=rloo"}


@functools.cache
def environments(config: EnvSection) -> VectorEnv:
    """The same processes for all cases; each case begins with new episodes."""
    return VectorEnv(config, 3)


def main(out: Path, overrides: list[str]) -> None:
    """Leader and followers; the leader writes its figures, everyone its weights."""
    torch.set_num_threads(1)
    grouped = bool(GROUPED & set(overrides))
    first = () if grouped else ("algorithm.warmup_iterations=1",)
    config = toy_config("env.num_envs=3", "algorithm.target_kl=none", *first, *overrides)
    group = Group.from_environment(sharded=config.backend.sharding == "full")
    policy = toy_policy(config, seed=group.rank)  # followers begin elsewhere: the leader's weights must reach them
    whole = toy_policy(config) if group.sharded and group.rank == 0 else None
    local = LocalLearner(policy, config.algorithm, seed=1, temperature=1.0, group=group, whole=whole)
    if group.rank > 0:
        follow(local, group)
    else:
        curriculum = build(
            "curricula", config.curriculum, tasks=config.env.tasks, num_starts=config.env.num_train_starts, seed=1
        )
        actors = LocalActors(
            whole or policy,
            [environments(config.env)],
            seed=1,
            temperature=1.0,
            train_vision=config.algorithm.train_vision,
            needs=config.algorithm.needs,
            max_steps=config.env.max_steps,
        )
        local.lead(actors.groups[0].shown)
        actors.load_weights(local.export_weights())
        rollout = actors.collect(curriculum.assign, 20).result()
        valid = rollout.valid.copy()
        valid[3:5, 1] &= grouped  # as lost workers leave it: the rows of a block are not all data
        rollout, figures = replace(rollout, valid=valid), []
        rewards = TaskReward(config.reward)(rollout)
        rewards = replace(rewards, total=rewards.total + np.float32(0.1) * rollout.ee_state[..., 0])
        for iteration in range(3):
            scored = local.score(rollout).result()
            stats = local.update(rollout, rewards, scored, iteration=iteration)
            figures.append(stats | ({} if scored.values is None else {"value_mean": float(scored.values.mean())}))
            if iteration == 1:  # a checkpoint in between, read back at once, changes nothing
                local.save(out / "saved")
                local.load(out / "saved", version=2)
        actors.load_weights(local.export_weights())  # checks itself: the copy acts as the trained one scores
        local.save(out / "final")
        local.close()
        (out / "figures.json").write_text(json.dumps(figures))
    if not group.sharded:
        save_file(dict(policy.state_dict()), out / f"weights-{group.rank}.safetensors")


if __name__ == "__main__":
    for number, (folder, changes) in enumerate(json.loads(sys.argv[1]).items()):
        if number == 1 and torchrun.size() > 1:
            store, _, _ = next(distributed.rendezvous("env://"))
        if number > 0 and torchrun.size() > 1:
            # PyTorch would look up the processes' addresses under the first group's keys again.
            own = distributed.PrefixStore(folder, store)
            distributed.init_process_group("gloo", store=own, rank=torchrun.rank(), world_size=torchrun.size())
        main(Path(folder), changes)
    torchrun.leave(0)
