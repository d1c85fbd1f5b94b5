"""What a training pipeline of many machines would do, from stage times measured on few: an event-driven simulation.

Each actor owns environments in groups. A group is decoded on the actor's device, then its environments step on the
cores of the node, then it is decoded again; two groups take turns, so that one decodes while the other simulates.
After `num_steps` of all groups the rollout is complete; rewards and scores, the update and the weight sync follow.

What it leaves out: learners take no cores, links are never congested, episodes need no resets, a rollout is scored
only when it is complete, and stage times are taken as given, whatever the number of devices.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import simpy

from pipeline_layout import Layout, Stages
from pipeline_rollout import Rollout, collect_rollouts

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE = 8
LEARNERS_PER_NODE = (1, 2, 4, 6)
"""Splits that the table tries: how many GPUs of a node learn."""

FASTER: dict[str, dict[str, float]] = {
    "decoding": {"decode_fixed_s": 0, "decode_row_s": 0},
    "simulation": {"env_step_s": 0, "env_wait_s": 0, "step_fixed_s": 0},
    "learning": {"score_row_s": 0, "update_row_s": 0, "gradient_bytes": 0},
    "reward": {"reward_row_s": 0},
    "sync": {"sync_fixed_s": 0, "sync_bytes": 0, "handover_s": 0},
}
"""Each stage, and what makes it infinitely fast."""


@dataclass(frozen=True)
class Outcome:
    """What an iteration costs once the pipeline runs; the first iteration is left out."""

    iteration_s: float
    decisions_per_s: float
    actor_idle: float
    """Share of time in which actor devices neither decode nor, colocated, learn."""
    learner_idle: float
    """Of learner devices; colocated, the same devices and the same figure. An all-reduce counts as busy."""
    core_idle: float
    """Of the cores of nodes with actors."""
    bottleneck: str
    """The stage of `shorter_s` with the largest gain; "balanced" where no single stage gains anything."""
    shorter_s: dict[str, float]
    """By how many seconds an iteration shortens when this stage alone takes no time."""


@dataclass(frozen=True)
class LearnerTimes:
    """Seconds of each part of an iteration after its rollout."""

    reward_s: float
    score_s: float
    update_s: float
    sync_s: float

    @classmethod
    def of(cls, stages: Stages, layout: Layout) -> "LearnerTimes":
        decisions, learners = layout.decisions, layout.learners
        optimiser_steps = layout.epochs * math.ceil(decisions / layout.minibatch)
        # A ring: each learner sends and receives all but its own share of the gradients, twice.
        allreduce_s = 2 * (learners - 1) / learners * stages.gradient_bytes / stages.gradient_bytes_per_s
        compute_s = stages.update_row_s * decisions * layout.epochs / learners / stages.learner_efficiency
        return cls(
            reward_s=stages.reward_row_s * decisions / (layout.reward_workers or learners),
            score_s=stages.score_row_s * decisions / learners,
            update_s=compute_s + optimiser_steps * allreduce_s,
            sync_s=stages.sync_fixed_s + stages.sync_bytes / stages.sync_bytes_per_s,
        )


def run_pipeline(stages: Stages, layout: Layout, rollouts: list[Rollout], iterations: int) -> list[float]:
    """Times at which each iteration's weights have reached the actors."""
    env, times = simpy.Environment(), LearnerTimes.of(stages, layout)
    handover_s = stages.handover_s if layout.placement == "colocated" else 0.0
    collected, synced = [env.event() for _ in rollouts], [env.event() for _ in range(iterations)]
    finished = []

    def collect() -> Generator[Any, Any, None]:
        for index, rollout in enumerate(rollouts):
            needed = index - 1 - layout.ahead  # the last weights, or with `ahead` those before; the first are there
            if needed >= 0:
                yield synced[needed]
            yield env.timeout(rollout.seconds)
            collected[index].succeed()

    def learn() -> Generator[Any, Any, None]:
        for index in range(iterations):
            yield collected[index]
            yield env.timeout(handover_s)
            if layout.reward_workers:
                yield env.timeout(times.reward_s) & env.timeout(times.score_s)
            else:
                yield env.timeout(times.reward_s + times.score_s)
            yield env.timeout(times.update_s)
            if layout.ahead:  # actors take weights between rollouts only
                yield collected[index + 1]
            yield env.timeout(times.sync_s + handover_s)
            synced[index].succeed()
            finished.append(env.now)

    env.process(collect())
    env.process(learn())
    env.run()
    return finished


def _period(finished: list[float]) -> float:
    """Mean seconds of an iteration, without the first."""
    return (finished[-1] - finished[0]) / (len(finished) - 1)


def simulate(stages: Stages, layout: Layout, *, iterations: int = 5, seed: int = 0) -> Outcome:
    """Run the pipeline, and once more with each stage infinitely fast: the one that gains most is the bottleneck.

    Args:
        stages: the measured times.
        layout: how many of what, and where.
        iterations: how many to run, at least 2, as the first is left out.
        seed: of the environments' step times, where `env_step_cv` is not 0.
    """
    if iterations < 2:
        raise ValueError(f"iterations is {iterations}, but at least 2 are needed: the first is left out.")
    count = iterations + layout.ahead  # the last update runs beside a rollout too
    rollouts = collect_rollouts(stages, layout, count, seed)
    iteration_s = _period(run_pipeline(stages, layout, rollouts, iterations))
    if iteration_s == 0:
        raise ValueError("no stage takes any time: there is nothing to simulate.")
    shorter_s = {}
    for stage, changes in FASTER.items():
        faster, same = replace(stages, **changes), stage not in ("decoding", "simulation")
        again = rollouts if same else collect_rollouts(faster, layout, count, seed)
        shorter_s[stage] = iteration_s - _period(run_pipeline(faster, layout, again, iterations))
    best = max(shorter_s, key=lambda stage: shorter_s[stage])
    actor_idle, learner_idle, core_idle = _idle(stages, layout, rollouts[1 + layout.ahead :], iteration_s)
    return Outcome(
        iteration_s=iteration_s,
        decisions_per_s=layout.decisions / iteration_s,
        actor_idle=actor_idle,
        learner_idle=learner_idle,
        core_idle=core_idle,
        bottleneck=best if shorter_s[best] > 1e-9 * iteration_s else "balanced",  # beyond rounding
        shorter_s=shorter_s,
    )


def _idle(stages: Stages, layout: Layout, rollouts: list[Rollout], iteration_s: float) -> tuple[float, float, float]:
    """Idle shares of actor devices, learner devices and cores over the iterations of these rollouts."""
    times, actors = LearnerTimes.of(stages, layout), len(layout.rows)
    learn_s = times.score_s + times.update_s + (0 if layout.reward_workers else times.reward_s)
    device_s = sum(rollout.device_s for rollout in rollouts) / len(rollouts)
    core_s = sum(rollout.core_s for rollout in rollouts) / len(rollouts)
    core_idle = 1 - core_s / (len(layout.nodes) * layout.cores * iteration_s)
    if layout.placement == "colocated":
        idle = 1 - (device_s + layout.learners * learn_s) / (actors * iteration_s)
        return idle, idle, core_idle
    return 1 - device_s / (actors * iteration_s), 1 - learn_s / iteration_s, core_idle


def table_openvla(
    stages: Stages,
    *,
    rows: int,
    num_steps: int,
    node_cores: int,
    groups: int = 2,
    epochs: int = 1,
    minibatch_per_gpu: int = 32,
    gpus: Sequence[int] = GPU_COUNTS,
) -> list[tuple[int, Layout, Outcome]]:
    """Print, for each number of GPUs, the best split that collects ahead and the colocated pipeline; return them.

    Nodes have 8 GPUs and are all alike; the cores of a node are dealt out evenly to the actors on it, so that a
    split leaves each actor more of them. The batch grows with the actors, the minibatch with the GPUs.

    Args:
        stages: the times, measured or assumed, of one GPU.
        rows: environments of each actor.
        num_steps: decisions of each environment in a rollout.
        node_cores: cores of a node.
        groups: groups of each actor.
        epochs: passes over a rollout.
        minibatch_per_gpu: rows of an optimiser step over the number of GPUs, learning or not.
        gpus: how many GPUs in all, each a multiple of 8.
    """
    actor = Layout(
        rows=(rows,), num_steps=num_steps, cores=node_cores, groups=groups, epochs=epochs, minibatch=minibatch_per_gpu
    )
    print("| GPUs | Layout | Decisions/s | Iteration, s | Actors idle | Learners idle | Bottleneck |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for total in gpus:
        layouts = [_on_nodes(actor, total, learning) for learning in (*LEARNERS_PER_NODE, 0)]
        *splits, colocated = [(total, layout, simulate(stages, layout)) for layout in layouts]
        for row in (max(splits, key=lambda split: split[2].decisions_per_s), colocated):
            found.append(row)
            print(_line(*row), flush=True)
    return found


def _on_nodes(actor: Layout, total: int, learning: int) -> Layout:
    """Many of `actor` on `total` GPUs, with so many learners on each node; 0: colocated."""
    nodes, rest = divmod(total, GPUS_PER_NODE)
    if rest or not nodes:
        raise ValueError(f"{total} GPUs are not whole nodes of {GPUS_PER_NODE}.")
    actors = GPUS_PER_NODE - learning
    return replace(
        actor,
        rows=actor.rows * (actors * nodes),
        cores=actor.cores // actors,
        learners=(learning or GPUS_PER_NODE) * nodes,
        minibatch=actor.minibatch * total,
        placement="split" if learning else "colocated",
        ahead=learning > 0,
    )


def _line(total: int, layout: Layout, outcome: Outcome) -> str:
    split = f"{len(layout.rows)} act, {layout.learners} learn, ahead"
    cells = (
        f"{total}",
        split if layout.ahead else "colocated",
        f"{outcome.decisions_per_s:,.1f}",
        f"{outcome.iteration_s:,.1f}",
        f"{outcome.actor_idle:.0%}",
        f"{outcome.learner_idle:.0%}",
        outcome.bottleneck,
    )
    return f"| {' | '.join(cells)} |"
