"""A simulated rollout against closed forms, and against a model that deals out tiny slices of time."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pipeline_example import LAYOUT, STAGES, rollout_s
from scipy.stats import norm

from pipeline_layout import Layout, Stages
from pipeline_rollout import collect_rollouts, node_rollout


def sliced_rollout(
    stages: Stages, layout: Layout, rows: tuple[int, ...], env_s: np.ndarray, slice_s: float
) -> tuple[float, float]:
    """Seconds of a rollout on one node and of work on its cores: in each slice of time, cores are dealt out anew."""
    ends, groups = np.cumsum([0, *rows]), []
    for actor in range(len(rows)):
        for columns in np.array_split(np.arange(ends[actor], ends[actor + 1]), layout.groups):
            groups.append({"actor": actor, "columns": columns, "step": 0, "doing": "queue", "left": [], "since": 0})
    number, worked = 0, 0.0
    while True:
        for group in sorted(groups, key=lambda group: group["since"]):  # who has waited longest decodes
            _move_on(stages, layout, group, groups, env_s, number)
        if all(group["doing"] == "done" for group in groups):
            return number * slice_s, worked
        decoders = [group for group in groups if group["doing"] == "decode"]
        wide = layout.decode_cores if layout.decode_on_cpu else 0
        decode_cores = min(layout.cores, wide * len(decoders))
        tasks = sum(left > 0 for group in groups if group["doing"] == "simulate" for left in group["left"])
        speeds = {
            "decode": decode_cores / (wide * len(decoders)) if wide and decoders else 1.0,
            "simulate": min(1.0, (layout.cores - decode_cores) / tasks) if tasks else 1.0,
            "wait": 1.0,
        }
        for group in groups:
            speed = speeds.get(group["doing"], 0.0) * slice_s
            cores = {"decode": wide, "simulate": 1}.get(group["doing"], 0)
            worked += cores * sum(min(speed, left) for left in group["left"])
            group["left"] = [max(0.0, left - speed) for left in group["left"]]
        number += 1


def _move_on(stages: Stages, layout: Layout, group: dict, groups: list[dict], env_s: np.ndarray, number: int) -> None:
    """Start what follows, in this slice, for a group that has nothing left of what it does."""
    while not any(group["left"]) and group["doing"] != "done":
        if group["doing"] == "queue":
            others = [other for other in groups if other["actor"] == group["actor"] and other is not group]
            if any(other["doing"] == "decode" for other in others):
                return
            decode_s = stages.decode_fixed_s + stages.decode_row_s * len(group["columns"])
            group.update(doing="decode", left=[decode_s])
        elif group["doing"] == "decode":
            group.update(doing="simulate", left=list(env_s[group["step"], group["columns"]]))
        elif group["doing"] == "simulate":
            group.update(doing="wait", left=[stages.env_wait_s + stages.step_fixed_s])
        else:
            step = group["step"] + 1
            group.update(doing="queue" if step < layout.num_steps else "done", left=[], step=step, since=number)


@pytest.mark.parametrize("case", range(24))
def test_a_rollout_takes_what_dealing_out_slices_takes(case):
    generator = np.random.default_rng(case)
    rows = tuple(generator.integers(2, 6, generator.integers(1, 4)).tolist())
    cores, slice_s = int(generator.integers(1, 5)), 1e-4
    layout = Layout(
        rows=rows,
        num_steps=4,
        cores=cores,
        actors_per_node=3,
        groups=int(generator.integers(1, min(rows) + 1)),
        decode_on_cpu=case % 4 > 0,
        decode_cores=int(generator.integers(1, cores + 1)),
    )
    decode_fixed_s, decode_row_s, env_wait_s, step_fixed_s = generator.uniform(0, [0.04, 0.01, 0.01, 0.01])
    stages = Stages(
        decode_fixed_s=decode_fixed_s, decode_row_s=decode_row_s, env_wait_s=env_wait_s, step_fixed_s=step_fixed_s
    )
    env_s = generator.lognormal(-3.5, 0.7, (4, sum(rows)))
    node = node_rollout(stages, layout, rows, env_s)
    seconds, core_s = sliced_rollout(stages, layout, rows, env_s, slice_s)
    # Each of three stages in each of 4 steps ends with its slice, which is late, also for the other actors.
    assert seconds - 3 * 4 * len(rows) * slice_s < node.seconds < seconds
    assert node.core_s == pytest.approx(core_s, rel=1e-9)


@pytest.mark.parametrize(("rows", "cores"), [(1, 4), (4, 4), (8, 4), (9, 4), (9, 1), (9, 64)])
def test_one_group_alternates_between_decoding_and_simulation_that_shares_the_cores(rows, cores):
    layout = Layout(rows=(rows,), num_steps=20, cores=cores)
    step_s = 0.3 + 0.017 * rows + max(1, rows / cores) * 0.11 + 0.029 + 0.0053
    assert rollout_s(STAGES, layout) == pytest.approx(20 * step_s)


def test_on_one_core_the_shorter_of_two_tasks_ends_at_twice_its_length_and_the_longer_at_the_sum():
    layout = Layout(rows=(1, 1), num_steps=2, cores=1, actors_per_node=2)
    together = Layout(rows=(2,), num_steps=1, cores=1)
    assert node_rollout(Stages(), together, (2,), np.array([[0.3, 0.5]])).seconds == pytest.approx(0.3 + 0.5)
    # The first actor's second step begins 1 s after its first has ended, when the other's is over, and takes 7 s.
    node = node_rollout(Stages(env_wait_s=1.0), layout, (1, 1), np.array([[0.3, 0.5], [7.0, 0.0]]))
    assert node.seconds == pytest.approx(2 * 0.3 + 1.0 + 7.0 + 1.0)


@pytest.mark.parametrize("env_step_s", [0.02, 0.19, 0.2, 0.21, 1.3])
def test_of_two_groups_one_decodes_while_the_other_simulates(env_step_s):
    stages = Stages(decode_fixed_s=0.12, decode_row_s=0.02, env_step_s=env_step_s)
    layout = Layout(rows=(8,), num_steps=50, cores=8, groups=2)
    decode_s = 0.12 + 4 * 0.02
    expected = 50 * max(2 * decode_s, decode_s + env_step_s) + min(decode_s, env_step_s)
    assert rollout_s(stages, layout) == pytest.approx(expected)


def test_two_groups_on_too_few_cores_are_bound_by_the_cores():
    # 8 tasks of 1 s a step on 2 cores, of which decoding hides all but the first group's first step.
    stages = Stages(decode_fixed_s=0.1, env_step_s=1.0)
    assert rollout_s(stages, Layout(rows=(8,), num_steps=30, cores=2, groups=2)) == pytest.approx(0.1 + 30 * 4)


@pytest.mark.parametrize("simulation_s", [0.4, 0.9, 1.0, 1.1, 3.0])
def test_of_two_groups_on_two_cores_one_decodes_on_the_core_that_the_other_leaves(simulation_s):
    # 1 s of decoding a group, then 4 tasks. While the other group decodes, a group simulates on one core.
    stages = Stages(decode_fixed_s=1.0, env_step_s=simulation_s / 4)
    layout = Layout(rows=(8,), num_steps=30, cores=2, groups=2, decode_on_cpu=True)
    # Short tasks are over before the other group is decoded: the device never rests, the last group ends on both
    # cores. Long ones share both cores until the first group is done: the other has then 1 s of work left, which it
    # gets on one core while the first decodes, so that both cores work from the second decoding on. At the end the
    # first group decodes no more, and this last second takes half.
    expected = 30 * 2 + simulation_s / 2 if simulation_s < 1 else 30 * (1 + simulation_s) + 0.5
    assert rollout_s(stages, layout) == pytest.approx(expected)


def test_decoding_takes_the_only_core_from_a_simulator():
    # The first group's simulator stands still while the second decodes; then both share the core and end together.
    stages = Stages(decode_fixed_s=1.0, env_step_s=0.3, env_wait_s=0.2)
    layout = Layout(rows=(2,), num_steps=10, cores=1, groups=2, decode_on_cpu=True)
    assert rollout_s(stages, layout) == pytest.approx(10 * (2 * 1.0 + 2 * 0.3 + 0.2))


@pytest.mark.parametrize(("decode_cores", "seconds"), [(1, 1.0), (2, 4 / 3), (3, 2.0)])
def test_decoding_processes_share_the_cores_where_they_want_more_than_there_are(decode_cores, seconds):
    stages = Stages(decode_fixed_s=1.0, env_step_s=0.3)
    layout = Layout(
        rows=(1, 1), num_steps=10, cores=3, actors_per_node=2, decode_on_cpu=True, decode_cores=decode_cores
    )
    assert rollout_s(stages, layout) == pytest.approx(10 * (seconds + 0.3))


def test_decoding_leaves_the_simulators_its_other_cores_and_not_one_more():
    # Of 4 cores the second decoding takes 3: for 1 s the two simulators of the first group share one.
    layout = Layout(rows=(4,), num_steps=1, cores=4, groups=2, decode_on_cpu=True, decode_cores=3)
    node = node_rollout(Stages(decode_fixed_s=1.0), layout, (4,), np.array([[3.0, 3.0, 1.0, 1.0]]))
    assert node.seconds == pytest.approx(1 + 1 + (3 - 0.5))


@pytest.mark.parametrize("first_s", [0.1, 0.2, 0.3, 0.6, 0.7])
@pytest.mark.parametrize("wait_s", [0.3, 0.6, 0.7])
def test_a_task_that_ends_when_another_actor_decodes_again_is_not_held_up_by_rounding(first_s, wait_s):
    # On one core, the second actor's longer task ends at the moment at which the first actor has waited.
    stages = Stages(decode_fixed_s=0.1, env_wait_s=wait_s)
    layout = Layout(rows=(1, 1), num_steps=2, cores=1, actors_per_node=2, decode_on_cpu=True)
    env_s = np.array([[first_s, first_s + wait_s], [0.0, 0.0]])
    tie_s = 2 * 0.1 + first_s + (first_s + wait_s)
    assert node_rollout(stages, layout, (1, 1), env_s).seconds == pytest.approx(tie_s + wait_s + 0.1 + wait_s)


def test_the_slowest_actor_ends_the_rollout():
    alone = [rollout_s(STAGES, replace(LAYOUT, rows=(rows,))) for rows in (4, 17, 9)]
    assert rollout_s(STAGES, replace(LAYOUT, rows=(4, 17, 9))) == max(alone) == alone[1]


def test_what_takes_no_time_waits_for_no_core():
    # One core on which three actors decode together, and environments that only wait.
    layout = Layout(rows=(1, 1, 1), num_steps=10, cores=1, actors_per_node=3, decode_on_cpu=True)
    assert rollout_s(Stages(decode_fixed_s=1.0, env_wait_s=0.7), layout) == pytest.approx(10 * (3 + 0.7))
    # The second group decodes on the only core while the environments of the first, which take none, wait.
    layout = Layout(rows=(2,), num_steps=10, cores=1, groups=2, decode_on_cpu=True)
    assert rollout_s(Stages(decode_fixed_s=1.0, env_wait_s=0.7), layout) == pytest.approx(10 * 2 + 0.7)
    # And a policy that takes no time takes no cores from the simulators either.
    stages = Stages(env_step_s=1.0, env_step_cv=0.7)
    layout = Layout(rows=(5, 3), num_steps=10, cores=3, actors_per_node=2, decode_on_cpu=True, decode_cores=3)
    assert rollout_s(stages, layout) == rollout_s(stages, replace(layout, decode_on_cpu=False))


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_actors_that_are_alike_and_share_a_node_stay_in_step(groups, cpu):
    alone = Layout(rows=(7,), num_steps=50, cores=2, groups=groups, decode_on_cpu=cpu)
    shared = replace(alone, rows=(7,) * 4, cores=8, actors_per_node=4)
    assert rollout_s(STAGES, shared) == pytest.approx(rollout_s(STAGES, alone))


@pytest.mark.parametrize("groups", [1, 2])
def test_actors_on_nodes_of_their_own_halve_a_simulation_bound_rollout(groups):
    stages = Stages(env_step_s=0.5)
    one = Layout(rows=(32,), num_steps=10, cores=4, groups=groups)
    two = replace(one, rows=(16, 16))
    shared = replace(two, actors_per_node=2)
    seconds = [rollout_s(stages, layout) for layout in (one, two, shared)]
    assert seconds == pytest.approx([10 * 4.0, 10 * 2.0, 10 * 4.0])


def test_nodes_that_are_alike_need_to_be_simulated_once_only():
    # With a variation too small to matter, every node is simulated.
    layout = Layout(rows=(5, 9) * 4 + (3,), num_steps=10, cores=3, actors_per_node=2, groups=2)
    once = collect_rollouts(STAGES, layout, 1, 0)[0]
    each = collect_rollouts(replace(STAGES, env_step_cv=1e-12), layout, 1, 0)[0]
    for name in ("seconds", "device_s", "core_s"):
        assert getattr(once, name) == pytest.approx(getattr(each, name), rel=1e-6)


@pytest.mark.parametrize("cv", [0.3, 1.5])
def test_varying_environment_steps_keep_their_mean_and_cost_the_slower_of_two(cv):
    stages = Stages(env_step_s=0.25, env_step_cv=cv)
    steps = 40_000
    error = 5 * cv / math.sqrt(steps)
    alone = rollout_s(stages, Layout(rows=(1,), num_steps=steps, cores=1))
    assert alone / steps == pytest.approx(0.25, rel=error)
    # The larger of two log-normal numbers with spread s is on average 2 Phi(s / sqrt 2) of their mean.
    larger = 2 * norm.cdf(math.sqrt(math.log(1 + cv**2)) / math.sqrt(2))
    pair = rollout_s(stages, Layout(rows=(2,), num_steps=steps, cores=2))
    assert pair / steps == pytest.approx(0.25 * larger, rel=error)


def test_variation_comes_from_the_seed_and_differs_between_rollouts_and_nodes():
    stages = replace(STAGES, env_step_cv=0.5)
    first, again = (collect_rollouts(stages, LAYOUT, 3, 7) for _ in range(2))
    assert first == again
    assert len({rollout.seconds for rollout in first + collect_rollouts(stages, LAYOUT, 3, 8)}) == 6
    one, three = (replace(LAYOUT, rows=(10,) * actors) for actors in (1, 3))
    # Three times the same draws would do exactly three times the work.
    assert collect_rollouts(stages, three, 1, 7)[0].core_s != 3 * collect_rollouts(stages, one, 1, 7)[0].core_s
