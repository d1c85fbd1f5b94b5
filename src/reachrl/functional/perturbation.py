"""Perturbations that need nothing of a simulator: noise on its frames, actions that arrive late.

The third, other words for the instruction, is said where instructions are: `reachrl.config.paraphrases`.
"""

from collections import deque
from collections.abc import Mapping
from typing import Self

import numpy as np
from jaxtyping import Float32, UInt8

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
    def of(cls, start: Start, rest: Float32[np.ndarray, "D"]) -> Self | None:
        """That of a start; None where no noise and no delay is asked for."""
        variant = Variant.of(start)
        return cls(start, variant, rest) if variant is not None and variant.axis in ("noise", "delay") else None

    def arriving(self, action: Float32[np.ndarray, "D"]) -> Float32[np.ndarray, "D"]:
        """The action that arrives at the control step in which `action` was chosen."""
        self._under_way.append(action)
        return self._under_way.popleft()

    def seen(self, images: Mapping[str, UInt8[np.ndarray, "H W 3"]], step: int) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """The frames u8[H W 3] by camera as they are seen after `step` control steps."""
        if self._variant.axis != "noise":
            return dict(images)
        rng = self._variant.generator(self._start, step)
        return {camera: _noisy(frame, self._variant.value, rng) for camera, frame in images.items()}


def _noisy(
    frame: UInt8[np.ndarray, "H W 3"], sigma: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    values = frame + sigma * rng.standard_normal(frame.shape, dtype=np.float32)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
