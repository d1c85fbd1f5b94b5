"""The smallest policy that keeps the contract: a table of logits by context, for testing algorithms."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reachrl.config.base import Section
from reachrl.policies.base import ActionSample, Evaluation, Noise, Policy, PolicyInputs
from reachrl.types import Observation


def given_noise(block: Float[Tensor, "B A V"]) -> Noise:
    """Noise that was drawn before."""
    return lambda position: block[:, position]


class TablePolicyConfig(Section):
    """Sizes of the table."""

    kind: str = "reachrl.testing.policies:TablePolicy"
    """Import string of the class."""
    num_contexts: int = 2
    """Rows of the table; an observation's first pixel says which row applies."""
    num_action_tokens: int = 2
    """Tokens per action, each independent of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableInputs(PolicyInputs):
    """The first pixel of each row, or what the one vision weight makes of it."""

    pixels: Float[Tensor, "B 1"] | None = None
    features: Float[Tensor, "B 1"] | None = None


class TablePolicy(Policy):
    """Independent categorical tokens with logits and a value looked up by context."""

    Config = TablePolicyConfig

    def __init__(self, config: TablePolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.num_action_tokens = config.num_action_tokens
        self.features = nn.Parameter(torch.ones(1))  # stands for the vision towers
        self.logits = nn.Parameter(torch.zeros(config.num_contexts, config.num_action_tokens, 256))
        self.value = nn.Parameter(torch.zeros(config.num_contexts))

    def prompt(self, instruction: str) -> str:
        """The instruction itself."""
        return instruction

    def encode(self, observation: Observation) -> TableInputs:
        """The context is the first pixel."""
        context = torch.from_numpy(observation.frames[:, 0, 0, 0].astype(np.int64))
        return TableInputs(pixels=context.float()[:, None])

    def cache(self, inputs: TableInputs) -> TableInputs:
        """The context, scaled by the one vision weight."""
        return TableInputs(features=self._features(inputs))

    def _features(self, inputs: TableInputs) -> Tensor:
        if inputs.features is not None:
            return inputs.features
        assert inputs.pixels is not None
        return inputs.pixels * self.features

    def _contexts(self, inputs: TableInputs) -> Tensor:
        return self._features(inputs)[:, 0].round().long()

    @torch.no_grad()
    def act(
        self,
        inputs: TableInputs,
        *,
        temperature: float = 1.0,
        noise: Noise | None = None,
        with_values: bool = True,
    ) -> ActionSample:
        """Sample every token at once."""
        logits = self.logits[self._contexts(inputs)] / temperature
        if noise is None:
            ids = logits.argmax(-1)
        else:
            ids = (logits + torch.stack([noise(position) for position in range(logits.shape[1])], 1)).argmax(-1)
        logprobs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return ActionSample.full(ids, logprobs, self.values(inputs))

    def evaluate(
        self,
        inputs: TableInputs,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_values: bool = True,
    ) -> Evaluation:
        """Look the logits up."""
        table = (self.logits[self._contexts(inputs)] / temperature).log_softmax(-1)
        logprobs = table.gather(-1, token_ids[..., None]).squeeze(-1)
        entropy = -(table.exp() * table).sum(-1)
        return Evaluation(logprobs=logprobs, entropy=entropy, values=self.values(inputs) if with_values else None)

    def values(self, inputs: TableInputs) -> Tensor:
        """Look the value up."""
        return self.value[self._contexts(inputs)]

    def decode_actions(self, token_ids: Tensor, token_mask: Tensor | None = None) -> np.ndarray:
        """Tokens spread evenly over [-1, 1]."""
        return (token_ids.numpy() / 127.5 - 1).astype(np.float32)[:, None]

    def encode_actions(self, actions: np.ndarray) -> tuple[Tensor, Tensor]:
        """The nearest token."""
        ids = torch.from_numpy(np.rint((actions[:, 0] + 1) * 127.5).astype(np.int64))
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def set_action_stats(self, q01: np.ndarray, q99: np.ndarray, mask: np.ndarray) -> None:
        """Actions are not normalised here."""

    def reset_critic(self) -> None:
        """The value table is the critic; there is no trunk to copy."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the tensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(self.config.model_dump_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "TablePolicy":
        """Read the tensors."""
        from safetensors.torch import load_file

        policy = cls(TablePolicyConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8")))
        policy.load_state_dict(load_file(folder / "model.safetensors"))
        return policy

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One parameter a role."""
        return {"vision": [self.features], "trunk": [self.logits], "value": [self.value]}

    def architecture(self) -> dict[str, Any]:
        """The table's sizes."""
        return self.config.model_dump(mode="json")
