"""Initial weights for a policy trained from scratch; a checkpoint overwrites all of them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.policies.openvla.vision import Projector

_NUM_HARMONICS = 8


def ordinal_rows(num_harmonics: int = _NUM_HARMONICS, device: torch.device | None = None) -> Float[Tensor, "256 K"]:
    """Smooth functions of a bin's action: cosines whose amplitude falls as 1 / k, of unit mean-square length.

    Row 0 stands for action +1 and row 255 for -1, as in the vocabulary.
    """
    action = torch.linspace(1, -1, NUM_ACTION_BINS, device=device)
    order = torch.arange(1, num_harmonics + 1, device=device)
    rows = torch.cos(math.pi / 2 * (action[:, None] + 1) * order) / order
    return rows / rows.square().sum(1).mean().sqrt()


@torch.no_grad()
def initialise(projector: Projector, language_model: LlamaForCausalLM, config: LanguageModelConfig) -> None:
    """Start where gradients say something.

    Three changes to the libraries' defaults:

    * neighbouring action tokens start with neighbouring rows in head and embedding. With independent rows each of the
      256 tokens is learned on its own: after 12,800 pictures of a block to be located, a small policy still answered
      with the mean (error 0.58 in [-1, 1]); with these rows the error was 0.03;
    * the projector keeps the variance of its input and has no bias: under the default initialisation the patches of
      one picture enter the trunk nearly alike (mean cosine 0.79, now about 0.5);
    * matrices of the trunk scale with its width; 0.02 suits 4096 columns and all but silences 128.
    """
    *hidden_layers, last_layer = (layer for layer in projector.children() if isinstance(layer, nn.Linear))
    for layer in (*hidden_layers, last_layer):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is last_layer else "relu")
        nn.init.zeros_(layer.bias)
    width = config.hidden_size
    std = 0.7 / math.sqrt(width)
    for name, parameter in language_model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.02 if name == "lm_head.weight" else std)
    rows = ordinal_rows(min(_NUM_HARMONICS, width), language_model.device)
    first = config.vocab_end - NUM_ACTION_BINS
    for table, scale in ((language_model.lm_head, 0.02), (language_model.model.embed_tokens, std)):
        directions = torch.empty(rows.shape[1], width, device=rows.device)
        nn.init.orthogonal_(directions)
        table.weight[first : config.vocab_end] = rows @ directions * scale * math.sqrt(width)
