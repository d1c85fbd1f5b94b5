"""Value head, and an optional separate trunk of the critic."""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel


class ValueHead(nn.Module):
    """Two linear layers in float32; the last is initialised to zero, so that an untrained critic returns 0."""

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
        """Whether the last layer differs from zero."""
        return bool(self.fc2.weight.any() or self.fc2.bias.any())

    def forward(self, hidden: Float[Tensor, "B E"]) -> Float[Tensor, "B"]:
        """Compute one value per row."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.fc2(F.silu(self.fc1(hidden.float()))).squeeze(-1)


class SeparateTrunk(nn.Module):
    """A copy of projector and language model for the critic, so that its loss does not affect the actor."""

    def __init__(self, projector: nn.Module, model: LlamaModel) -> None:
        super().__init__()
        self.projector = deepcopy(projector)
        self.model = deepcopy(model)

    @torch.no_grad()
    def copy_from(self, projector: nn.Module, model: LlamaModel) -> None:
        """Copy the actor's current weights."""
        self.projector.load_state_dict(projector.state_dict())
        self.model.load_state_dict(model.state_dict())
