"""The robot's state as one token of the sequence."""

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reachrl.functional.action_stats import ActionStats


class ProprioProjector(nn.Module):
    """Maps a normalised state into the language model's embedding space, under the official names.

    Source: Kim et al. 2025, OpenVLA-OFT, its released `ProprioProjector`.
    """

    def __init__(self, state_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, state: Float[Tensor, "B S"]) -> Float[Tensor, "B E"]:
        """One token per row."""
        return self.fc2(F.gelu(self.fc1(state)))


def normalise_state(state: Float[np.ndarray, "N S"], stats: ActionStats) -> Float[np.ndarray, "N S"]:
    """Map states to [-1, 1] by their quantiles, clipped: 2 (x - q01) / (q99 - q01 + epsilon) - 1.

    A number that never moved in training maps to -1 where it stays, as in the release.

    Args:
        state: in the robot's units.
        stats: of states; dimensions outside the mask are clipped alone.
    """
    values = np.asarray(state, np.float64)
    unit = 2.0 * (values - stats.q01) / (stats.q99 - stats.q01 + stats.epsilon) - 1.0
    return np.clip(np.where(stats.mask, unit, values), -1.0, 1.0)
