"""Augmentation against one pixel at a time."""

import numpy as np
import pytest

from reachrl.config.demos import SFTSection
from reachrl.demos.augment import Jitter, apply_jitter, augment, sample_jitter

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)


def still(batch: int) -> dict[str, np.ndarray]:
    return {
        "shift": np.zeros((batch, 2), np.int64),
        "gain": np.ones((batch, 3), np.float32),
        "contrast": np.ones(batch, np.float32),
        "offset": np.zeros(batch, np.float32),
    }


def brute_force_shift(frame: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Pad with repeated edges, then cut: another way than clamped indices."""
    pad = 10
    padded = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    height, width = frame.shape[:2]
    return padded[pad - dy : pad - dy + height, pad - dx : pad - dx + width]


def test_shift_moves_content_and_repeats_edges() -> None:
    shifts = np.array([[0, 0], [2, -3], [-4, 1], [1, 0], [0, -8]])
    out = apply_jitter(FRAMES, Jitter(**{**still(5), "shift": shifts}))
    for frame, moved, (dy, dx) in zip(FRAMES, out, shifts, strict=True):
        np.testing.assert_array_equal(moved, brute_force_shift(frame, dy, dx))
    np.testing.assert_array_equal(out[3][1:], FRAMES[3][:-1])  # dy = +1: down


def test_light_equals_the_formula_pixel_by_pixel() -> None:
    rng = np.random.default_rng(1)
    config = SFTSection(shift_pixels=3, brightness=0.3, contrast=0.4, colour=0.2)
    jitter = sample_jitter(config, 5, rng)
    out = apply_jitter(FRAMES, jitter)
    for b, frame in enumerate(FRAMES):
        x = brute_force_shift(frame, *jitter.shift[b]).astype(np.float64) * jitter.gain[b]
        wanted = (x - x.mean()) * jitter.contrast[b] + x.mean() + jitter.offset[b]
        assert np.abs(np.clip(wanted, 0, 255) - out[b]).max() <= 0.5 + 1e-3
    assert (out == 0).any()  # clipping was put to the test, at both ends
    assert (out == 255).any()


def test_strengths_bound_the_draws() -> None:
    config = SFTSection(shift_pixels=2, brightness=0.1, contrast=0.2, colour=0.3)
    jitter = sample_jitter(config, 4000, np.random.default_rng(0))
    assert set(np.unique(jitter.shift)) == {-2, -1, 0, 1, 2}
    for values, centre, width in (
        (jitter.gain, 1.0, 0.3),
        (jitter.contrast, 1.0, 0.2),
        (jitter.offset, 0.0, 25.5),
    ):
        assert np.abs(values - centre).max() == pytest.approx(width, rel=0.01)
        assert values.mean() == pytest.approx(centre, abs=0.05 * width)
    assert len(np.unique(jitter.gain)) > 3000  # each frame and channel its own


def test_no_strength_leaves_frames_alone() -> None:
    config = SFTSection(shift_pixels=0, brightness=0.0, contrast=0.0, colour=0.0)
    np.testing.assert_array_equal(augment(FRAMES, config, np.random.default_rng(0)), FRAMES)
    np.testing.assert_array_equal(apply_jitter(FRAMES, Jitter(**still(5))), FRAMES)


def test_draws_follow_the_generator() -> None:
    config = SFTSection()
    one, two, other = (augment(FRAMES, config, np.random.default_rng(s)) for s in (4, 4, 5))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
