"""The sequence of a row: `[BOS][patches of each camera][state][padding][rest of the prompt][placeholders][</s>]`."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlamaModel

from reachrl.policies.llama import Contexts, last_hidden
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.sequence import arrange

STOP_ID = 2  # `</s>` of Llama-2; in the built-in vocabulary the token that closes a prompt


def embed_chunk(
    model: LlamaModel, patches: Float[Tensor, "B P E"], inputs: OpenVLAInputs, *, num_tokens: int, stop: bool
) -> tuple[Float[Tensor, "B S E"], Bool[Tensor, "B S"]]:
    """Embed rows, whatever padding their prompts come with, and say which positions are real.

    Args:
        model: the language model without its head.
        patches: what stands between BOS and the prompt: patches of each camera in turn, then the state's token.
        inputs: the prompts.
        num_tokens: action tokens. Each has a placeholder of zeros: only its place tells it from the others.
        stop: whether `</s>` closes the sequence.

    Source: Kim et al. 2025, OpenVLA-OFT, its released `predict_action`.
    """
    embeds, valid = arrange(model, patches, inputs)
    batch, _, width = embeds.shape
    tail = [embeds.new_zeros(batch, num_tokens, width)]
    if stop:
        tail.append(model.embed_tokens(inputs.prompt_ids.new_full((batch, 1), STOP_ID)))
    embeds = torch.cat([embeds, *tail], 1)
    return embeds, torch.cat([valid, valid.new_ones(batch, num_tokens + int(stop))], 1)


def chunk_hidden(
    model: LlamaModel,
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    *,
    num_tokens: int,
    stop: bool,
    recompute: Contexts | None = None,
) -> Float[Tensor, "B A E"]:
    """Normed hidden states that the action tokens are read from, by attention in both directions.

    The first token is read at the end of the prompt, each other one at the placeholder of the token before it. The
    last placeholder and `</s>` are attended to and never read.
    """
    hidden = last_hidden(model, embeds, valid, 1 + num_tokens + int(stop), recompute, causal=False)
    return hidden[:, :num_tokens]
