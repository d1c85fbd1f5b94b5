"""Curricula: where the weight peaks, smoothing, floors, draws, exact resume."""

import json

import numpy as np
import pytest

from reachrl.config.curriculum import SuccessRateConfig, UniformConfig
from reachrl.curriculum.success_rate import SuccessRateSampler
from reachrl.curriculum.uniform import UniformSampler
from reachrl.types import Episode, Start

TASKS = ("never", "half", "always")


def episode(task, index, success):
    return Episode(start=Start(task, "train", index), success=success, num_steps=10, env=0)


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
