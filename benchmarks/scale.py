"""What more actors, groups of environments and collecting ahead bring; what the pipeline simulator says of it.

    python benchmarks/scale.py [actors overlap ahead table] [--repeats 3]

Everything on the backend `ray` of this machine, with a simulator whose step takes as long as it is told. Stage times
are measured alone, the simulator is fed with them, and its prediction stands beside what was measured. `table` predicts
OpenVLA-7B on 8 to 512 GPUs from times that `reachrl plan` predicts: nothing of it was measured.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from busy_env import BusyConfig
from pipeline_simulator import Layout, Stages, simulate, table_openvla
from reachrl.backends.base import Workers
from reachrl.backends.local import LocalActors, open_groups
from reachrl.backends.policy_loading import new_policy
from reachrl.config.loading import load_config
from reachrl.config.train import TrainConfig
from reachrl.plan.device import find_device
from reachrl.plan.memory import trained
from reachrl.plan.outline import outline_of
from reachrl.plan.timing import plan_time
from reachrl.policies.base import Policy
from reachrl.registry import build
from reachrl.rewards.task import TaskReward
from reachrl.types import Start

STEPS = 40
POLICY = [f"policy.language_model.{size}" for size in ("num_layers=4", "hidden_size=256", "intermediate_size=512")]


def configuration(*changes: str) -> TrainConfig:
    """The toy preset with a simulator that takes its time and a policy that does, too."""
    options = ["env.kind=busy_env:BusyEnv", "num_threads=1", f"rollout.num_steps={STEPS}", "backend.kind=ray", *POLICY]
    return load_config("toy", [*options, "env.max_steps=15", "env.image_size=48", *changes])


def assign(number: int) -> Start:
    """Any start."""
    return Start("red-square", "train", number % 50)


@contextmanager
def workers(config: TrainConfig):
    """The workers of a run that begins from random weights."""
    with tempfile.TemporaryDirectory() as folder:
        new_policy(config).save_pretrained(Path(folder) / "policy")
        with build("backends", config.backend).open(config, Path(folder) / "policy", encoding="utf-8") as found:
            yield found


def collecting_seconds(found: Workers, repeats: int) -> float:
    """Of one rollout, the best of some: this machine has other things to do."""
    found.actors.load_weights(found.learner.export_weights())
    found.actors.collect(assign, STEPS).result()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        found.actors.collect(assign, STEPS).result()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measured_stages(policy: Policy, config: TrainConfig, rows: tuple[int, ...]) -> Stages:
    """Decoding, and the answers of simulators that take no time, measured in this process by number of rows.

    Whatever happens between an answer and the next decoding counts as decoding.
    """
    free = config.env.model_copy(update={"compute_s": 0.0, "wait_s": 0.0})
    decode, answer = [], []
    for count in rows:
        actors = LocalActors(policy, open_groups(free, count, 1), seed=1, temperature=1.0)
        actors.collect(assign, 5)
        actors.take_spans()
        began = time.perf_counter()
        actors.collect(assign, STEPS)
        seconds = time.perf_counter() - began
        simulating = [span.end - span.start for span in actors.take_spans() if span.what == "simulate"]
        actors.close()
        answer.append(statistics.median(simulating))
        decode.append((seconds - sum(simulating)) / STEPS)
    decode_row, decode_fixed = np.polyfit(rows, decode, 1) if len(rows) > 1 else (0.0, decode[0])
    answer_row, answer_fixed = np.polyfit(rows, answer, 1) if len(rows) > 1 else (0.0, answer[0])
    return Stages(
        decode_fixed_s=max(0.0, float(decode_fixed)),
        decode_row_s=max(0.0, float(decode_row)),
        env_step_s=max(0.0, float(answer_row)),
        step_fixed_s=max(0.0, float(answer_fixed)),
    )


def told(stages: Stages, config: TrainConfig) -> Stages:
    """The stages with what this configuration's simulator takes."""
    assert isinstance(config.env, BusyConfig)
    return replace(stages, env_step_s=stages.env_step_s + config.env.compute_s, env_wait_s=config.env.wait_s)


def line(name: str, seconds: float, predicted: float, decisions: int) -> None:
    print(
        f"{name:44s} {seconds:7.3f} s  {decisions / seconds:7.1f} decisions/s   simulator {predicted:7.3f} s "
        f"({predicted / seconds - 1:+.0%})",
        flush=True,
    )


def compare_actors(repeats: int) -> None:
    """Each actor brings its own environment: how much more do two collect than one?"""
    print("\nActors, one environment each, simulation-bound (25 ms of computing a step)")
    speed = {}
    for actors in (1, 2):
        config = configuration(f"env.num_envs={actors}", f"backend.actors={actors}", "env.compute_s=0.025")
        policy = new_policy(config).eval()
        with workers(config) as found:
            stages = told(measured_stages(policy, config, (1,)), config)
            seconds = collecting_seconds(found, repeats)
        layout = Layout(
            rows=(1,) * actors, num_steps=STEPS, cores=os.cpu_count() or 1, actors_per_node=actors, decode_on_cpu=True
        )
        line(f"{actors} actor(s)", seconds, simulate(stages, layout).iteration_s, actors * STEPS)
        speed[actors] = actors * STEPS / seconds
    print(f"second actor: {speed[2] / speed[1]:.2f} times the decisions/s")


def compare_overlap(repeats: int) -> None:
    """Decoding while other simulators step, where both take equally long."""
    rows = 16
    config = configuration(f"env.num_envs={rows}")
    policy = new_policy(config).eval()
    with workers(config):  # what runs besides costs its share
        stages = measured_stages(policy, config, (4, 8, 16))
    decode = stages.decode_fixed_s + rows * stages.decode_row_s
    print(f"\nGroups of one actor's {rows} environments; decoding all takes {1e3 * decode:.1f} ms")
    cores = os.cpu_count() or 1
    for name, change in (
        ("computing", f"env.compute_s={decode * cores / rows}"),
        ("waiting", f"env.wait_s={decode}"),
    ):
        base = None
        for groups in (1, 2, 4):
            config = configuration(f"env.num_envs={rows}", f"backend.env_groups={groups}", change)
            with workers(config) as found:
                seconds = collecting_seconds(found, repeats)
            layout = Layout(rows=(rows,), num_steps=STEPS, cores=cores, groups=groups, decode_on_cpu=True)
            line(
                f"simulators {name}, {groups} group(s)",
                seconds,
                simulate(told(stages, config), layout).iteration_s,
                rows * STEPS,
            )
            base = base or seconds
            print(f"    {base / seconds:.2f} times as fast as one group")


def iterations(config: TrainConfig, found: Workers, repeats: int) -> dict[str, float]:
    """Median seconds of an iteration and of its stages, in the order of the training loop."""
    reward, took = TaskReward(), []

    def collect():
        found.actors.load_weights(found.learner.export_weights())
        return found.actors.collect(assign, STEPS)

    spans, ahead = [], None
    for iteration in itertools.count():
        began = time.perf_counter()
        rollout = (ahead or collect()).result()
        if config.collect_ahead:
            ahead = collect()
        scored = found.learner.score(rollout).result()
        found.learner.update(rollout, reward(rollout), scored, iteration=iteration)
        took.append(time.perf_counter() - began)
        spans += found.learner.take_spans() if iteration else []
        if iteration == repeats + 1:
            break
    if ahead is not None:
        ahead.result()
    stage = {what: statistics.median(s.end - s.start for s in spans if s.what == what) for what in ("score", "update")}
    return {"iteration": statistics.median(took[2:])} | stage


def compare_ahead(repeats: int) -> None:
    """Collecting the next rollout while the learner works on the last one."""
    rows = 4
    options = [
        f"env.num_envs={rows}",
        "algorithm.importance_cap=2.0",
        "reward.kind=task",
        "algorithm.minibatch_size=80",
    ]
    config = configuration(*options)
    policy = new_policy(config).eval()
    with workers(config) as found:
        stages = measured_stages(policy, config, (rows,))
        alone = iterations(config, found, repeats)
        # Weights, rollouts and rewards on their way.
        transport = alone["iteration"] - alone["score"] - alone["update"] - collecting_seconds(found, repeats)
    learning = alone["score"] + alone["update"]
    # A simulator that waits for as long as makes collecting take as long as learning.
    decode = stages.decode_fixed_s + rows * stages.decode_row_s
    wait = max(0.001, learning / STEPS - decode - stages.step_fixed_s)
    print(f"\nCollecting ahead; scoring and updating take {learning:.2f} s, a rollout is made to take as long")
    decisions, base = rows * STEPS, None
    for ahead in (False, True):
        config = configuration(*options, f"env.wait_s={wait}", f"collect_ahead={str(ahead).lower()}")
        with workers(config) as found:
            seconds = iterations(config, found, repeats)["iteration"]
        fed = replace(
            told(stages, config),
            score_row_s=alone["score"] / decisions,
            update_row_s=alone["update"] / decisions / config.algorithm.epochs,  # pyright: ignore
            sync_fixed_s=max(0.0, transport),
        )
        layout = Layout(
            rows=(rows,), num_steps=STEPS, cores=os.cpu_count() or 1, decode_on_cpu=True, ahead=ahead,
            epochs=config.algorithm.epochs, minibatch=80,  # pyright: ignore
        )  # fmt: skip
        line(f"ahead {ahead}", seconds, simulate(fed, layout).iteration_s, decisions)
        base = base or seconds
    print(f"collecting ahead: {base / seconds:.2f} times as fast")


def openvla_stages(rows: int) -> tuple[Stages, TrainConfig]:
    """Stage times of OpenVLA-7B on an H200, as `reachrl plan` predicts them; simulators as measured on LIBERO."""
    device = find_device("h200")
    seconds = {}
    for count in (rows // 2, rows):
        config = load_config("libero_spatial", [f"env.num_envs={count}"])
        parts = {part.name.split(",")[0]: part.seconds for part in plan_time(config, device).stretches}
        seconds[count] = parts
    decode_row = (
        (seconds[rows]["acting"] - seconds[rows // 2]["acting"]) / (rows - rows // 2) / config.rollout.num_steps
    )
    decode = seconds[rows]["acting"] / config.rollout.num_steps
    decisions = rows * config.rollout.num_steps
    epochs = config.algorithm.epochs  # pyright: ignore[reportAttributeAccessIssue]
    adapters = trained(outline_of(config, accelerator=True))
    return (
        Stages(
            decode_fixed_s=decode - rows * decode_row,
            decode_row_s=decode_row,
            env_step_s=0.0058,  # libero_object at 128 pixels, 345 decisions/s on two cores
            step_fixed_s=0.001,
            score_row_s=seconds[rows]["scoring"] / decisions,
            update_row_s=seconds[rows]["PPO"] / decisions / epochs,
            gradient_bytes=adapters,
            gradient_bytes_per_s=40e9,
            sync_fixed_s=0.5,
            sync_bytes=adapters,
            sync_bytes_per_s=2e9,
            handover_s=2.0,
        ),
        config,
    )


def print_table(_: int) -> None:
    """OpenVLA-7B from 8 to 512 GPUs: predictions from predictions."""
    rows = 64
    stages, config = openvla_stages(rows)
    steps = config.rollout.num_steps
    print(f"\nOpenVLA-7B with adapters on H200s, predicted; {rows} environments an actor, {steps} steps")
    print(f"{stages}\n")
    table_openvla(
        stages,
        rows=rows,
        num_steps=config.rollout.num_steps,
        node_cores=192,
        epochs=config.algorithm.epochs,  # pyright: ignore[reportAttributeAccessIssue]
    )


PARTS = {"actors": compare_actors, "overlap": compare_overlap, "ahead": compare_ahead, "table": print_table}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        PARTS[part](options.repeats)


if __name__ == "__main__":
    main()
