"""A policy whose answers differ in length and may stand for no action, as one plug-in file.

An answer spells the numbers of an action, one token each, and ends with a token of its own: `0.4 -0.2 END` moves x and
y and leaves the rest at 0. One without a number, with too many of them or without an end is malformed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reachrl.config.base import Section
from reachrl.policies.base import ActionSample, Evaluation, Policy, PolicyInputs

DIMS, LEVELS, SLOTS, FIRST = 4, 11, 6, 50
END = FIRST + LEVELS


class ShortConfig(Section):
    kind: str = "short_answers:ShortPolicy"
    hidden: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortInputs(PolicyInputs):
    colours: Tensor  # [B 3], the frame's mean


class ShortPolicy(Policy):
    """Reads the mean colour; the hidden state of a slot adds up the tokens before it."""

    Config = ShortConfig
    num_action_tokens, num_choices, first_choice, action_dim = SLOTS, LEVELS + 1, FIRST, DIMS

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = nn.Linear(3, config.hidden)
        self.tokens = nn.Parameter(torch.randn(SLOTS, LEVELS + 1, config.hidden))
        self.head = nn.Linear(config.hidden, LEVELS + 1)
        self.value = nn.Linear(config.hidden, 1)

    def prompt(self, instruction):
        return instruction

    def encode(self, observation):
        return ShortInputs(colours=torch.from_numpy(observation.frames.mean((1, 2)) / 255).float())

    def _logprobs(self, hidden, temperature):
        return (self.head(torch.tanh(hidden)) / temperature).log_softmax(-1)

    @torch.no_grad()
    def act(self, inputs, *, temperature=1.0, noise=None, with_values=True):
        hidden = self.vision(inputs.colours)
        values = self.value(hidden)[:, 0]
        ids = torch.zeros(len(hidden), SLOTS, dtype=torch.long)
        mask, logprobs = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
        running = torch.ones(len(hidden), dtype=torch.bool)
        for slot in range(SLOTS):
            if not running.any():
                break
            table = self._logprobs(hidden, temperature)
            choice = (table if noise is None else table + noise(slot)).argmax(-1)
            ids[:, slot], mask[:, slot] = (choice + FIRST).where(running, 0), running
            logprobs[:, slot] = table.gather(1, choice[:, None])[:, 0].where(running, 0)
            hidden, running = hidden + self.tokens[slot, choice], running & (choice + FIRST != END)
        numbers = (mask & (ids != END)).sum(1)
        malformed = running | (numbers == 0) | (numbers > DIMS)
        return ActionSample(token_ids=ids, token_mask=mask, logprobs=logprobs, values=values, malformed=malformed)

    def evaluate(self, inputs, token_ids, token_mask, *, temperature=1.0, with_values=True):
        first = self.vision(inputs.colours)
        choice = (token_ids - FIRST).where(token_mask, 0)
        said = self.tokens[torch.arange(SLOTS), choice]
        hidden = first[:, None] + said.cumsum(1) - said  # of the tokens before
        table = self._logprobs(hidden, temperature)
        logprobs = table.gather(-1, choice[..., None])[..., 0]
        entropy = -(table.exp() * table).sum(-1)
        return Evaluation(logprobs=logprobs, entropy=entropy, values=self.value(first)[:, 0] if with_values else None)

    def values(self, inputs):
        return self.value(self.vision(inputs.colours))[:, 0]

    def decode_actions(self, token_ids, token_mask):
        numbers = (token_mask & (token_ids != END))[:, :DIMS]
        levels = (token_ids[:, :DIMS] - FIRST).where(numbers, (LEVELS - 1) // 2)
        return (levels.numpy() / ((LEVELS - 1) / 2) - 1).astype(np.float32)[:, None]

    def encode_actions(self, actions):
        levels = np.rint((np.clip(actions[:, 0], -1, 1) + 1) * (LEVELS - 1) / 2).astype(np.int64)
        ids = torch.zeros(len(levels), SLOTS, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, numbers in enumerate(levels):
            length = max(1, int(np.max(np.flatnonzero(numbers != (LEVELS - 1) // 2), initial=-1)) + 1)
            ids[row, :length] = torch.from_numpy(numbers[:length]) + FIRST
            ids[row, length], mask[row, : length + 1] = END, True
        return ids, mask

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
        policy = cls(ShortConfig.model_validate_json((Path(folder) / "config.json").read_text()))
        policy.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return policy

    def parameter_groups(self):
        return {
            "vision": list(self.vision.parameters()),
            "trunk": [self.tokens, *self.head.parameters()],
            "value": list(self.value.parameters()),
        }

    def architecture(self):
        return self.config.model_dump(mode="json")
