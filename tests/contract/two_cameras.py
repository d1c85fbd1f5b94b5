"""A policy with two cameras, a state and chunks of eight actions, as one plug-in file."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from reachrl.config.base import Section
from reachrl.policies.base import ActionSample, Evaluation, Policy, PolicyInputs

CHOICES, GRID, FIRST_ID = 21, 4, 100


class ChunkConfig(Section):
    kind: str = "two_cameras:ChunkPolicy"
    num_actions: int = 8
    action_dim: int = 4
    hidden: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInputs(PolicyInputs):
    images: Tensor  # [B 2 3 G G]
    state: Tensor  # [B 3]


class ChunkPolicy(Policy):
    """All tokens of a chunk at once, from a coarse picture of each camera and the state."""

    Config = ChunkConfig
    num_choices, num_cameras, state_size, first_choice = CHOICES, 2, 3, FIRST_ID

    def __init__(self, config):
        super().__init__()
        self.config, self.num_actions = config, config.num_actions
        self.num_action_tokens = config.num_actions * config.action_dim
        self.vision = nn.Conv2d(3, 3, 1)
        width = config.hidden
        self.trunk = nn.Sequential(nn.Linear(2 * 3 * GRID**2 + 3, width), nn.LayerNorm(width), nn.GELU())
        self.head = nn.Linear(config.hidden, self.num_action_tokens * CHOICES)
        self.value_head = nn.Linear(config.hidden, 1)

    def token_actions(self):
        return torch.arange(self.num_actions).repeat_interleave(self.config.action_dim)

    def prompt(self, instruction):
        return instruction

    def encode(self, observation):
        def coarse(frames):
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
            return functional.adaptive_avg_pool2d(pixels, GRID)

        first, second = list(observation.images.values())[:2]
        return ChunkInputs(
            images=torch.stack([coarse(first), coarse(second)], 1), state=torch.from_numpy(observation.state)
        )

    def _hidden(self, inputs):
        seen = self.vision(inputs.images.flatten(0, 1)).reshape(len(inputs), -1)
        return self.trunk(torch.cat([seen, inputs.state], 1))

    def _logits(self, hidden, temperature):
        return self.head(hidden).reshape(-1, self.num_action_tokens, CHOICES) / temperature

    @torch.no_grad()
    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        hidden = self._hidden(inputs)
        logits = self._logits(hidden, temperature)
        drawn = 0 if noise is None else torch.stack([noise(position) for position in range(logits.shape[1])], 1)
        chosen = (logits + drawn).argmax(-1)
        logprobs = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
        return ActionSample.full(chosen + FIRST_ID, logprobs, self.value_head(hidden)[:, 0])

    def evaluate(self, inputs, token_ids, token_mask, *, temperature=1.0, with_values=True):
        hidden = self._hidden(inputs)
        table = self._logits(hidden, temperature).log_softmax(-1)
        logprobs = table.gather(-1, (token_ids - FIRST_ID)[..., None])[..., 0]
        values = self.value_head(hidden)[:, 0] if with_values else None
        return Evaluation(logprobs=logprobs, entropy=-(table.exp() * table).sum(-1), values=values)

    def values(self, inputs):
        return self.value_head(self._hidden(inputs))[:, 0]

    def decode_actions(self, token_ids, token_mask):
        actions = (token_ids - FIRST_ID).cpu().numpy() / ((CHOICES - 1) / 2) - 1
        return actions.astype(np.float32).reshape(len(token_ids), self.num_actions, self.config.action_dim)

    def encode_actions(self, actions):
        chosen = np.rint((np.clip(actions, -1, 1) + 1) * (CHOICES - 1) / 2).astype(np.int64)
        ids = torch.from_numpy(chosen.reshape(len(actions), -1)) + FIRST_ID
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def set_action_stats(self, q01, q99, mask):
        pass

    def reset_critic(self):
        pass

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(self.config.model_dump(mode="json")))

    @classmethod
    def from_pretrained(cls, folder):
        policy = cls(ChunkConfig.model_validate_json((Path(folder) / "config.json").read_text()))
        policy.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return policy

    def parameter_groups(self):
        return {
            "vision": list(self.vision.parameters()),
            "trunk": [*self.trunk.parameters(), *self.head.parameters()],
            "value": list(self.value_head.parameters()),
        }

    def architecture(self):
        return self.config.model_dump(mode="json")
