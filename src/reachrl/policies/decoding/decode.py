"""Batched decoding of action tokens over a static cache: ids, log-probabilities and the value's hidden state."""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaModel

from reachrl.policies.base import Noise
from reachrl.policies.decoding.cache import Prompt, prefill, step
from reachrl.policies.decoding.recordings import Recordings
from reachrl.policies.llama import PLAIN, LayerPass


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Result of decoding one batch."""

    token_ids: Int64[Tensor, "B A"]  # vocabulary ids
    logprobs: Float[Tensor, "B A"]
    first_hidden: Float[Tensor, "B E"]  # at the prompt's last position: what the value head reads


def action_logits(
    hidden: Float[Tensor, "*B E"], head: Float[Tensor, "V E"], temperature: float
) -> Float[Tensor, "*B V"]:
    """Compute logits of the selectable tokens, divided by the temperature, in float32.

    Args:
        hidden: normed hidden states.
        head: the rows of the language model's head that may be chosen: the 256 action tokens, as a rule.
        temperature: > 0; the same number in rollout and loss.

    Returns:
        f32 logits whose softmax is the sampling distribution.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.float()) / temperature


def choose(logits: Float[Tensor, "B V"], noise: Float[Tensor, "B V"] | None, *, mean: bool) -> Int64[Tensor, "B 1"]:
    """Choose one of the selectable tokens in each row.

    Args:
        logits: after the temperature.
        noise: standard Gumbel noise samples the softmax; None: the likeliest token.
        mean: the token nearest to the mean of the softmax over the tokens' numbers instead.
    """
    if mean:
        numbers = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return (logits.softmax(-1) @ numbers).round().long().unsqueeze(-1)
    return (logits if noise is None else logits + noise).argmax(-1, keepdim=True)


def choose_tokens(
    model: LlamaModel,
    head: Float[Tensor, "V E"],
    prompt: Prompt,
    noise: Noise | None,
    *,
    first_id: int,
    num_tokens: int,
    temperature: float,
    mean: bool = False,
) -> tuple[Int64[Tensor, "B A"], Float[Tensor, "B A"]]:
    """Choose the tokens after a prompt one by one, with their log-probs; see `decode`.

    Writes only to the cache and never synchronises, so that it can be captured as a CUDA graph.
    """
    hidden = prompt.hidden
    ids, logprobs = [], []
    for position in range(num_tokens):
        logits = action_logits(hidden, head, temperature)
        choice = choose(logits, None if noise is None else noise(position), mean=mean)
        ids.append(choice + first_id)
        logprobs.append(logits.log_softmax(-1).gather(1, choice))
        if position + 1 < num_tokens:
            hidden = step(model, prompt, position, model.embed_tokens(ids[-1]))
    return torch.cat(ids, 1), torch.cat(logprobs, 1)


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
    noise: Noise | None,
    mean: bool = False,
    recordings: Recordings | None = None,
    layer_pass: LayerPass = PLAIN,
) -> Decoded:
    """One prefill and `num_tokens - 1` single-token steps.

    A token is `argmax(logits / temperature + noise)`, an exact sample of the softmax for standard Gumbel noise.

    Args:
        model: the language model without its head.
        head: the rows of its head that may be chosen.
        embeds: the prompt, right-aligned: the last position is a real token in every row.
        valid: which positions are real tokens.
        first_id: vocabulary id of row 0 of `head`.
        num_tokens: tokens to decode.
        temperature: divides the logits.
        noise: of each position, or None for greedy decoding.
        mean: choose the token nearest to the mean of its distribution instead.
        recordings: replays of the steps; None: they are launched one by one.
        layer_pass: computes the layers of the prefill.

    Returns:
        Ids, their log-probabilities under the sampling distribution, and the first position's hidden state.

    Source: Gumbel-max trick, Maddison et al. 2014, A* Sampling, section 2.
    """
    steps, batch, length = num_tokens - 1, *embeds.shape[:2]
    cache = None if recordings is None else recordings.cache(model, batch, length + steps, embeds)
    prompt = prefill(model, embeds, valid, steps, cache=cache, layer_pass=layer_pass)
    tokens_after = functools.partial(
        choose_tokens, model, head, first_id=first_id, num_tokens=num_tokens, temperature=temperature, mean=mean
    )
    if recordings is None:
        ids, logprobs = tokens_after(prompt, noise)
    else:
        block = torch.zeros(batch, num_tokens, len(head), device=head.device)
        if noise is not None:  # a recording reads all of it from one place
            block = torch.stack([noise(position) for position in range(num_tokens)], 1)

        def work(prompt: Prompt, block: Tensor) -> tuple[Tensor, Tensor]:
            return tokens_after(prompt, lambda position: block[:, position])

        ids, logprobs = recordings.replay(work, prompt, block, name=(temperature, mean))
    return Decoded(token_ids=ids, logprobs=logprobs, first_hidden=prompt.hidden)
