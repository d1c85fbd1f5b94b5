"""The sequence of a row: `[BOS][patches of each camera][state][rest of the prompt][placeholders][</s>][padding]`.

Padding stands last, as SimpleVLA-RL moves it: sums over the real positions are then taken in the order in which they
are taken of the row alone, where padding in their midst would cost 5e-5 of a logit in float32.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlamaModel

from reachrl.policies.llama import Contexts, LayerPass, acting_hidden, last_hidden
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.sequence import arrange

STOP_ID = 2  # `</s>` of Llama-2; in the built-in vocabulary the token that closes a prompt


def embed_chunk(
    model: LlamaModel, patches: Float[Tensor, "B P E"], inputs: OpenVLAInputs, *, num_tokens: int, stop: bool
) -> tuple[Float[Tensor, "B S E"], Bool[Tensor, "B S"]]:
    """Embed rows, whatever padding their prompts come with, and say which positions are real: all but the last ones.

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
    valid = torch.cat([valid, valid.new_ones(batch, num_tokens + int(stop))], 1)
    if most_padding(inputs, valid) == 0:
        return embeds, valid
    order = (~valid).long().argsort(dim=1, stable=True)
    return embeds.gather(1, order[..., None].expand_as(embeds)), valid.gather(1, order)


def most_padding(inputs: OpenVLAInputs, valid: Bool[Tensor, "B S"]) -> int:
    """Padding of the row that has the most; on an accelerator the most there can be, as looking would stall it."""
    return int((~valid).sum(1).max()) if valid.device.type == "cpu" else inputs.prompt_ids.shape[1] - 1


def chunk_hidden(
    model: LlamaModel,
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    *,
    num_tokens: int,
    stop: bool,
    padding: int,
    recompute: Contexts | None = None,
    acting: LayerPass | None = None,
) -> Float[Tensor, "B A E"]:
    """Normed hidden states that the action tokens are read from, by attention in both directions.

    The first token is read at the end of the prompt, each other one at the placeholder of the token before it. The
    last placeholder and `</s>` are attended to and never read.

    Args:
        model: the language model without its head.
        embeds: see `embed_chunk`.
        valid: see `embed_chunk`.
        num_tokens: action tokens.
        stop: whether `</s>` closes the sequence.
        padding: of the row that has the most.
        recompute: see `last_hidden`.
        acting: computes the layers of a copy for acting; None: `model` is what is trained.
    """
    number = 1 + num_tokens + int(stop) + padding
    if acting is None:
        hidden = last_hidden(model, embeds, valid, number, recompute, causal=False)
    else:
        hidden = acting_hidden(model, embeds, valid, number, layer_pass=acting)
    if padding == 0:
        return hidden[:, :num_tokens]
    first = padding - (~valid).sum(1)
    places = first[:, None] + torch.arange(num_tokens, device=valid.device)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
