"""Quality figures against brute force and scipy."""

import math

import numpy as np
import pytest

from reachrl.rewards.process.quality import ScoredTrajectory, auc, average_ranks, measure, reliability, spearman


def brute_auc(scores, positive):
    pairs = [(p, n) for p in scores[positive] for n in scores[~positive]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def tied(rng, size):
    return rng.integers(0, 6, size) / 5.0


def test_auc_is_the_share_of_correctly_ordered_pairs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, positive = tied(rng, 30), rng.random(30) < 0.3
        positive[:2] = [True, False]
        assert auc(scores, positive) == pytest.approx(brute_auc(scores, positive), abs=1e-12)


def test_auc_needs_both_classes():
    assert auc(np.array([0.1, 0.9]), np.array([True, True])) is None
    assert auc(np.array([0.1, 0.9]), np.array([False, True])) == 1.0
    assert auc(np.array([0.9, 0.1]), np.array([False, True])) == 0.0


def test_ranks_and_spearman_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b = tied(rng, 12), tied(rng, 12)
        np.testing.assert_allclose(average_ranks(a), stats.rankdata(a))
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_a_constant_is_unknown():
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.ones(1), np.ones(1)) is None


def test_reliability_by_hand():
    scores = np.array([0.05, 0.05, 0.62, 0.68, 1.0])
    labels = np.array([0.0, 1.0, 1.0, 0.5, 1.0])
    bins, error = reliability(scores, labels, 10)
    assert [(b["low"], b["n"]) for b in bins] == [(0.0, 2), (0.6, 2), (0.9, 1)]
    assert bins[1]["mean_score"] == pytest.approx(0.65) and bins[1]["mean_label"] == pytest.approx(0.75)
    assert error == pytest.approx((2 * 0.45 + 2 * 0.10 + 0) / 5)


def test_a_model_of_true_probabilities_is_calibrated_and_a_shifted_one_is_not():
    rng = np.random.default_rng(2)
    p = rng.random(20_000)
    y = (rng.random(20_000) < p).astype(float)
    assert reliability(p, y)[1] < 0.02
    odds = p / (1 - p) * 4
    assert reliability(odds / (1 + odds), y)[1] > 0.15


def scored(success, scores, labels, task="push"):
    return ScoredTrajectory(
        task=task, success=success, scores=np.array(scores, np.float32), labels=np.array(labels, np.float32)
    )


def test_measure_by_hand():
    result = measure(
        [
            scored(True, [0.1, 0.4, 0.9], [0, 0.5, 1]),
            scored(True, [0.2, 0.6, 0.3], [0, 0.5, 1]),
            scored(False, [0.1, 0.7, 0.4], [0, 0, 0]),
            scored(False, [0.0, 0.1, 0.2], [0, 0, 0]),
        ]
    )
    assert (result["successes"], result["failures"], result["frames"]) == (2, 2, 12)
    assert result["auc"] == pytest.approx(3 / 4)  # 0.9 beats both, 0.3 beats only 0.2
    assert result["rank_correlation"] == pytest.approx((1.0 + 0.5) / 2)
    assert result["false_positive_rate"] == pytest.approx(1 / 6)
    assert result["false_alarm_rate"] == pytest.approx(1 / 2)
    assert result["accuracy"] == pytest.approx(9 / 12)
    assert result["majority_accuracy"] == pytest.approx(8 / 12)
    pairs = [(0.1, 0), (0.4, 0.5), (0.9, 1), (0.2, 0), (0.6, 0.5), (0.3, 1)] + [(s, 0) for s in (0.1, 0.7, 0.4)]
    pairs += [(1e-7, 0), (0.1, 0), (0.2, 0)]
    loss = -np.mean([y * math.log(p) + (1 - y) * math.log(1 - p) for p, y in pairs])
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


def test_measure_admits_what_it_cannot_know():
    only_success = measure([scored(True, [0.1, 0.9], [0, 1])])
    assert only_success["auc"] is None and only_success["false_positive_rate"] is None
    assert measure([])["auc"] is None and measure([])["frames"] == 0
