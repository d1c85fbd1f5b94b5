"""Curricula: where the weight peaks, smoothing, floors, draws, their chances, exact resume."""

import json

import numpy as np
import pytest

from reachrl.config.curriculum import SuccessRateConfig, UniformConfig
from reachrl.curriculum.success_rate import SuccessRateSampler
from reachrl.curriculum.uniform import UniformSampler
from reachrl.functional.stats import weighted_rate
from reachrl.iteration_record import uniform_success
from reachrl.types import Episode, Start

TASKS = ("never", "half", "always")


def episode(task, index, success):
    return Episode(start=Start(task, "train", index), success=success, num_steps=10, num_decisions=10, env=0)


def trained(seed=0, **options):
    sampler = SuccessRateSampler(SuccessRateConfig(**options), tasks=TASKS, num_starts=5, seed=seed)
    for i in range(100):
        sampler.observe([episode("never", i % 5, False), episode("half", i % 5, (i // 5) % 2 == 0)])
        sampler.observe([episode("always", i % 5, True)])
    return sampler


def test_peak_prefers_half_and_the_printed_formula_prefers_failure():
    peak = trained(floor=0.0).probabilities().sum(1)
    assert peak[1] > 0.9 and peak[0] == pytest.approx(peak[2], rel=0.05)
    paper = trained(floor=0.0, weighting="paper").probabilities().sum(1)
    assert paper[0] > paper[1] > paper[2]


def test_the_printed_formula_is_eq_4():
    sampler = trained(floor=0.0, weighting="paper", temperature=0.5)
    _, success = sampler.success_rates()
    expected = np.exp((0.5 - success) / 0.5)
    np.testing.assert_allclose(sampler.probabilities(), expected / expected.sum())


def test_the_floor_keeps_every_start_alive():
    chances = trained(floor=0.3).probabilities()
    assert chances.sum() == pytest.approx(1.0)
    assert chances.min() >= 0.3 / 15


def test_a_start_never_tried_inherits_its_task():
    sampler = SuccessRateSampler(SuccessRateConfig(prior_strength=2.0), tasks=TASKS, num_starts=5, seed=0)
    sampler.observe([episode("always", 0, True)] * 8)
    by_task, by_start = sampler.success_rates()
    keep = 1 - 1 / 60
    wins = sum(keep**i for i in range(8))
    assert by_task[2] == pytest.approx((wins + 1.0) / (wins + 2.0))
    assert by_start[2, 1] == by_task[2]
    assert by_start[2, 0] > by_task[2]
    assert by_task[0] == 0.5


def test_old_outcomes_fade():
    sampler = SuccessRateSampler(SuccessRateConfig(window=10), tasks=TASKS, num_starts=5, seed=0)
    sampler.observe([episode("half", 0, False)] * 50)
    sampler.observe([episode("half", 0, True)] * 50)
    assert sampler.success_rates()[0][1] > 0.8


def test_evidence_on_a_start_fades_with_every_outcome_of_its_task():
    sampler = SuccessRateSampler(SuccessRateConfig(window=10, prior_strength=2.0), tasks=TASKS, num_starts=5, seed=0)
    sampler.observe([episode("half", 0, False)])
    sampler.observe([episode("half", 1, True)] * 7 + [episode("always", 0, True)] * 9)
    (_, by_task, _), by_start = sampler.success_rates()
    left = 0.9**7  # of the one failure, after 7 outcomes of other starts of the task
    assert by_start[1, 0] == pytest.approx(2.0 * by_task / (left + 2.0))
    sampler.observe([episode("half", 1, True)] * 300)
    (_, by_task, _), by_start = sampler.success_rates()
    assert by_start[1, 0] == pytest.approx(by_task, abs=1e-12)  # forgotten: as a start never tried


def simulate(sampler, rates, count, seed):
    """Episodes of a policy that stands still: true success `rates` [tasks, starts], drawn and observed in turn."""
    draw, episodes = np.random.default_rng(seed), []
    for number in range(count):
        drawn = sampler.draw(number)
        where = TASKS.index(drawn.start.task), drawn.start.index
        success = bool(draw.random() < rates[where])
        episodes.append(
            Episode(start=drawn.start, success=success, num_steps=1, num_decisions=1, env=0, chance=drawn.chance)
        )
        sampler.observe(episodes[-1:])
    return episodes


def test_equally_hard_starts_are_drawn_equally_in_the_long_run():
    starts = 40
    sampler = SuccessRateSampler(SuccessRateConfig(window=20), tasks=TASKS, num_starts=starts, seed=1)
    episodes = simulate(sampler, np.full((3, starts), 0.9), 3000, seed=2)
    first, second = episodes[:1000], episodes[1500:]
    failed = {each.start for each in first if not each.success}
    share = sum(each.start in failed for each in second) / len(second)
    expected = len(failed) / (3 * starts)
    assert 0.4 < expected < 0.8  # both kinds are many
    assert abs(share - expected) < 0.05, (
        share,
        expected,
    )  # fading by own outcomes: 0.62, 0.46


def test_success_weighed_by_the_chance_of_a_draw_is_the_policys_own():
    rates = np.repeat([[0.6], [0.95], [0.95]], 30, axis=1)
    true_mean = 2.5 / 3
    sampler = SuccessRateSampler(SuccessRateConfig(floor=0.2), tasks=TASKS, num_starts=30, seed=3)
    episodes = simulate(sampler, rates, 4000, seed=4)
    raw, uniform = [], []
    for first in range(0, 4000, 1000):
        block = episodes[first : first + 1000]
        raw.append(np.mean([each.success for each in block]))
        record = uniform_success(block, sampler)
        uniform.append(record["success_uniform"])
        error = np.sqrt(true_mean * (1 - true_mean) / record["success_uniform_n"])
        assert abs(record["success_uniform"] - true_mean) < 3 * error
        weights = [1 / (90 * each.chance) for each in block]
        assert record["success_uniform_weight"] == pytest.approx(sum(weights))
        assert record["success_uniform"] == pytest.approx(np.average([e.success for e in block], weights=weights))
    assert max(raw) < 0.75  # the curriculum asks for what fails: this "curve" says less than the policy can
    assert abs(np.mean(uniform) - true_mean) < 0.02


def test_uniform_draws_weigh_the_same_and_unknown_chances_give_no_figure():
    sampler = UniformSampler(UniformConfig(), tasks=TASKS, num_starts=5, seed=0)
    episodes = simulate(sampler, np.full((3, 5), 0.5), 50, seed=0)
    record = uniform_success(episodes, sampler)
    assert record["success_uniform"] == pytest.approx(np.mean([each.success for each in episodes]))
    assert record["success_uniform_n"] == pytest.approx(50) and record["success_uniform_weight"] == pytest.approx(50)
    unknown = [*episodes, episode("half", 1, True)]
    assert set(uniform_success(unknown, sampler).values()) == set(uniform_success([], sampler).values()) == {None}


def test_a_sampler_that_assigns_in_its_own_way_states_no_chance():
    class InTurn(UniformSampler):
        def assign(self, number):
            return Start(self.tasks[number % 3], "train", 0)

    drawn = InTurn(UniformConfig(), tasks=TASKS, num_starts=5, seed=0).draw(1)
    assert drawn.start == Start("half", "train", 0) and drawn.chance is None


def test_the_effective_number_of_weighted_outcomes():
    rate, effective = weighted_rate([True, False, True], [1.0, 1.0, 2.0])
    assert (rate, effective) == (0.75, 16 / 6)


def test_draws_follow_the_probabilities():
    sampler = trained(floor=0.3)
    expected = sampler.probabilities()
    counts = np.zeros_like(expected)
    for number in range(4000):
        start = sampler.assign(number)
        assert start.split == "train"
        counts[TASKS.index(start.task), start.index] += 1
    error = np.abs(counts / 4000 - expected)
    assert (error < 4 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9).all()


@pytest.mark.parametrize(
    "make", [lambda: trained(seed=7), lambda: UniformSampler(UniformConfig(), tasks=TASKS, num_starts=5, seed=7)]
)
def test_resume_continues_the_same_draws(make):
    whole, cut = make(), make()
    first = [whole.assign(number) for number in range(20)]
    assert [cut.assign(number) for number in reversed(range(20))] == first[::-1]  # whoever asks, in any order
    state = json.loads(json.dumps(cut.state_dict()))
    resumed = (
        UniformSampler(UniformConfig(), tasks=TASKS, num_starts=5, seed=7)
        if isinstance(cut, UniformSampler)
        else (SuccessRateSampler(SuccessRateConfig(), tasks=TASKS, num_starts=5, seed=7))
    )
    resumed.load_state_dict(state)
    whole.observe([episode("half", 1, True)])
    resumed.observe([episode("half", 1, True)])
    assert [resumed.assign(n) for n in range(20, 40)] == [whole.assign(n) for n in range(20, 40)]
    assert resumed.metrics() == whole.metrics()
