"""The progress model must learn a task whose progress is visible, and nothing where outcomes are shuffled."""

from dataclasses import replace

import numpy as np
import pytest

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.rewards.process.fit import fit_reward_model
from reachrl.types import Start, Trajectory

CONFIG = SmallRewardModelConfig(
    image_size=32, channels=(16, 16, 24, 24), hidden=32, steps=250, batch_size=64, shift_pixels=1, heldout_fraction=0.35
)


def dot_episode(index, *, success, generator, length=10):
    """A dot that walks from the left edge to a square at the right, or wanders off to another height."""
    goal_y, start_y = generator.uniform(6, 26, 2)
    end_y = goal_y if success else (goal_y + generator.choice([-1, 1]) * generator.uniform(9, 14)) % 32
    s = np.linspace(0, 1, length + 1)
    x, y = 3 + 24 * s, start_y + (np.clip(end_y, 2, 29) - start_y) * s
    grid_y, grid_x = np.mgrid[0:32, 0:32]
    images = np.full((length + 1, 32, 32, 3), 60, dtype=np.uint8)
    images[:, (abs(grid_y - goal_y) < 3) & (abs(grid_x - 27) < 3), 1] = 220
    for t in range(length + 1):
        images[t, (abs(grid_y - y[t]) < 2) & (abs(grid_x - x[t]) < 2), 0] = 255
    ee_state = np.stack([x / 32, y / 32, np.zeros_like(x), np.full_like(x, 0.5)], axis=1).astype(np.float32)
    return Trajectory(
        start=Start("dot", "train", index),
        instruction="move the dot to the square",
        images={"camera": images},
        actions=np.zeros((length, 2), dtype=np.float32),
        ee_state=ee_state,
        success=success,
        source="expert",
    )


def episodes(count, seed):
    generator = np.random.default_rng(seed)
    return [dot_episode(i, success=bool(i % 2), generator=generator) for i in range(count)]


@pytest.mark.parametrize("seed", [0, 1])
def test_visible_progress_is_learned(tmp_path, seed):
    quality = fit_reward_model(episodes(240, seed), CONFIG, seed=seed, folder=tmp_path).quality["heldout"]
    assert quality["successes"] >= 40 and quality["failures"] >= 40
    assert quality["auc"] > 0.95
    assert quality["rank_correlation"] > 0.9
    assert quality["accuracy"] > quality["majority_accuracy"] + 0.05
    assert quality["calibration_error"] < 0.08
    assert quality["false_positive_rate"] < 0.15


def test_shuffled_outcomes_teach_nothing(tmp_path):
    data = episodes(240, 0)
    outcomes = np.random.default_rng(5).permutation([trajectory.success for trajectory in data])
    data = [replace(trajectory, success=bool(outcome)) for trajectory, outcome in zip(data, outcomes, strict=True)]
    quality = fit_reward_model(data, CONFIG, seed=0, folder=tmp_path).quality["heldout"]
    assert 0.35 < quality["auc"] < 0.65  # chance is 0.5 with a standard error of 0.06


def test_the_papers_labels_are_learned_too(tmp_path):
    config = CONFIG.model_copy(update={"label": "keyframe"})
    quality = fit_reward_model(episodes(160, 2), config, seed=0, folder=tmp_path).quality["heldout"]
    assert quality["auc"] > 0.95 and quality["auc_frame"] > 0.95
