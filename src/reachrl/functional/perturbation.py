"""Perturbations that need nothing of a simulator: noise on its frames, actions that arrive late.

The third, other words for the instruction, is said where instructions are: `reachrl.config.paraphrases`.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from reachrl.config.perturbations import Variant
from reachrl.types import Start


class Filter:
    """What lies between a policy and the simulator in one perturbed episode.

    Args:
        start: of the episode.
        variant: its perturbation.
        rest: the action f32[D] that is carried out until the first one arrives.
    """

    def __init__(self, start: Start, variant: Variant, rest: Float32[np.ndarray, "D"]) -> None:
        self._start, self._variant = start, variant
        late = int(variant.value) if variant.axis == "delay" else 0
        self._under_way = deque([rest] * late)

    @classmethod
    def of(cls, start: Start, rest: Float32[np.ndarray, "D"]) -> "Filter | None":
        """That of a start; None where no noise and no delay is asked for."""
        variant = Variant.of(start)
        return cls(start, variant, rest) if variant is not None and variant.axis in ("noise", "delay") else None

    def arriving(self, action: Float32[np.ndarray, "D"]) -> Float32[np.ndarray, "D"]:
        """The action that arrives at the control step in which `action` was chosen."""
        self._under_way.append(action)
        return self._under_way.popleft()

    def seen(self, images: Mapping[str, UInt8[np.ndarray, "..."]], step: int) -> dict[str, UInt8[np.ndarray, "..."]]:
        """The frames u8[H W 3] by camera, as they are seen after `step` control steps."""
        if self._variant.axis != "noise":
            return dict(images)
        rng = self._variant.generator(self._start, step)
        return {camera: _noisy(frame, self._variant.value, rng) for camera, frame in images.items()}


def arriving_at_all(
    filters: "Sequence[Filter | None]", actions: Float32[np.ndarray, "N D"], running: Bool[np.ndarray, "N"]
) -> Float32[np.ndarray, "N D"]:
    """`Filter.arriving` of `N` rows, of those that run; a row without a filter stays as it is."""
    rows = [(n, each) for n, each in enumerate(filters) if each is not None and running[n]]
    arriving = actions.copy() if rows else actions
    for n, each in rows:
        arriving[n] = each.arriving(actions[n])
    return arriving


def seen_by_all(
    filters: "Sequence[Filter | None]", images: Mapping[str, UInt8[np.ndarray, "..."]], steps: Int64[np.ndarray, "N"]
) -> dict[str, UInt8[np.ndarray, "..."]]:
    """`Filter.seen` of `N` rows after as many control steps each; `images` themselves are not written to."""
    rows = [(n, each) for n, each in enumerate(filters) if each is not None]
    shown = {camera: frames.copy() if rows else frames for camera, frames in images.items()}
    for n, each in rows:
        for camera, frame in each.seen({camera: frames[n] for camera, frames in images.items()}, int(steps[n])).items():
            shown[camera][n] = frame
    return shown


def _noisy(frame: UInt8[np.ndarray, "..."], sigma: float, rng: np.random.Generator) -> UInt8[np.ndarray, "..."]:
    values = frame + sigma * rng.standard_normal(frame.shape, dtype=np.float32)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
