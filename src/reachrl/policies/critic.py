"""State values: a small head on a hidden state, and an optional critic with a trunk of its own."""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel


class ValueHead(nn.Module):
    """Two linear maps in float32; the last starts at zero, so that an untrained critic says 0 everywhere."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, 1)
        self.reset()

    def reset(self) -> None:
        """Reset to the initial weights."""
        self.fc1.reset_parameters()
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    @property
    def trained(self) -> bool:
        """Whether anything was learned: an untrained head says 0 everywhere."""
        return bool(self.fc2.weight.any() or self.fc2.bias.any())

    def forward(self, hidden: Float[Tensor, "B E"]) -> Float[Tensor, "B"]:
        """One value per row."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.fc2(F.silu(self.fc1(hidden.float()))).squeeze(-1)


class SeparateTrunk(nn.Module):
    """The critic's own copy of projector and language model: its loss cannot move the actor."""

    def __init__(self, projector: nn.Module, model: LlamaModel) -> None:
        super().__init__()
        self.projector = deepcopy(projector)
        self.model = deepcopy(model)

    @torch.no_grad()
    def copy_from(self, projector: nn.Module, model: LlamaModel) -> None:
        """Start again from the actor's current weights."""
        self.projector.load_state_dict(projector.state_dict())
        self.model.load_state_dict(model.state_dict())
