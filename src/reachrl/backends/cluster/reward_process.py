"""The reward worker, as it runs inside a Ray actor."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from reachrl.backends.policy_loading import device_of, limit_threads
from reachrl.config.train import TrainConfig
from reachrl.rewards.process.base import RewardModel


class RewardProcess:
    """Scores frames with a copy of the reward model.

    Args:
        config: the run's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._model: RewardModel | None = None

    def take_model(self, model: RewardModel) -> None:
        """Score with this model from now on."""
        limit_threads(self._config)
        wanted = getattr(self._config.reward, "device", "auto")
        self._model = model.to(device_of(self._config) if wanted == "auto" else torch.device(wanted)).eval()

    def score(
        self, clips: np.ndarray, instructions: Sequence[str], batch_size: int
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """P(progress) f32[B] of clips u8[B F H W 3], and when it was computed."""
        assert self._model is not None
        began = time.time()
        return self._model.score(clips, instructions, batch_size=batch_size), (began, time.time())
