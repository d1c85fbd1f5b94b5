"""Batched decoding of action tokens over a static cache: ids, log-probabilities and the value's hidden state."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaModel

from reachrl.policies.llama import CachedSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What one pass over a batch yields."""

    action_ids: Int64[Tensor, "B A"]  # vocabulary ids
    logprobs: Float[Tensor, "B A"]
    first_hidden: Float[Tensor, "B E"]  # at the prompt's last position: what the value head reads


def action_logits(
    hidden: Float[Tensor, "*B E"], head: Float[Tensor, "V E"], temperature: float
) -> Float[Tensor, "*B V"]:
    """Logits of the tokens that may be chosen, divided by the temperature, in float32.

    Args:
        hidden: normed hidden states.
        head: the rows of the language model's head that may be chosen: the 256 action tokens, as a rule.
        temperature: > 0; the same number in rollout and loss.

    Returns:
        f32 logits whose softmax is the sampling distribution.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.float()) / temperature


@torch.no_grad()
def decode(
    model: LlamaModel,
    head: Float[Tensor, "V E"],
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    *,
    first_id: int,
    num_tokens: int,
    temperature: float,
    gumbel: Float[Tensor, "B A V"] | None,
) -> Decoded:
    """One prefill and `num_tokens - 1` single-token steps.

    A token is `argmax(logits / temperature + gumbel)`, an exact sample of the softmax for standard Gumbel noise.

    Args:
        model: the language model without its head.
        head: the rows of its head that may be chosen.
        embeds: the prompt, right-aligned: the last position is a real token in every row.
        valid: which positions are real tokens.
        first_id: vocabulary id of row 0 of `head`.
        num_tokens: tokens to decode.
        temperature: divides the logits.
        gumbel: noise, or None for greedy decoding.

    Returns:
        Ids, their log-probabilities under the sampling distribution, and the first position's hidden state.

    Source: Gumbel-max trick, Maddison et al. 2014, A* Sampling, section 2.
    """
    steps = CachedSteps(model, embeds, valid, num_tokens - 1)
    hidden = first_hidden = steps.hidden[:, -1]
    ids, logprobs = [], []
    for position in range(num_tokens):
        logits = action_logits(hidden, head, temperature)
        scores = logits if gumbel is None else logits + gumbel[:, position]
        choice = scores.argmax(-1, keepdim=True)
        ids.append(choice + first_id)
        logprobs.append(logits.log_softmax(-1).gather(1, choice))
        if position + 1 < num_tokens:
            hidden = steps.step(model.embed_tokens(ids[-1]))[:, -1]
    return Decoded(action_ids=torch.cat(ids, 1), logprobs=torch.cat(logprobs, 1), first_hidden=first_hidden)
