"""Cached decoding with transformers' Llama: prefill of a prompt and single-token steps."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaModel

from reachrl.policies.llama import (
    PLAIN,
    LayerPass,
    attend,
    causal_mask,
    decoder_layers,
    has_padding,
    position_ids,
    project,
)


@dataclass(slots=True)
class KVCache:
    """A static KV cache of all layers, allocated once for the whole sequence and filled from the left."""

    keys: list[Tensor]  # one [B heads S head_dim] per layer
    values: list[Tensor]

    @classmethod
    def allocate(cls, model: LlamaModel, batch: int, length: int, like: Tensor) -> "KVCache":
        """Allocate `length` positions in each of `batch` rows."""
        attention = decoder_layers(model)[0].self_attn
        num_heads = attention.k_proj.out_features // attention.head_dim
        shape = (len(model.layers), 2, batch, num_heads, length, attention.head_dim)
        store = torch.empty(shape, dtype=like.dtype, device=like.device)
        return cls(keys=[layer[0] for layer in store], values=[layer[1] for layer in store])

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """Number of positions per row."""
        return self.keys[0].shape[2]

    def first(self, rows: int) -> "KVCache":
        """Return a view of the first `rows` rows."""
        return KVCache(keys=[keys[:rows] for keys in self.keys], values=[values[:rows] for values in self.values])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prefilled prompt: its place in the cache, and what single-token steps need."""

    cache: KVCache  # with room for the steps
    length: int  # S, positions of the prompt
    hidden: Float[Tensor, "B E"]  # normed, of its last position
    cos: Float[Tensor, "R N D"]  # rotary embedding of the N steps; one row for all if none is padded
    sin: Float[Tensor, "R N D"]
    seen: Bool[Tensor, "B 1 1 K"] | None  # what steps may look at; None: everything


def prefill(
    model: LlamaModel,
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    num_steps: int,
    *,
    cache: KVCache | None = None,
    layer_pass: LayerPass = PLAIN,
) -> Prompt:
    """Fill the cache with the keys and values of a prompt.

    Args:
        model: the language model without its head.
        embeds: token and patch embeddings.
        valid: which positions are real tokens; the last one must be.
        num_steps: single-token steps that are to follow.
        cache: written to from its first position on; None: a new one.
        layer_pass: computes the layers.
    """
    batch, length, _ = embeds.shape
    cache = cache or KVCache.allocate(model, batch, length + num_steps, embeds)
    padded = has_padding(valid)
    seen = F.pad(valid, (0, num_steps), value=True)
    cos, sin = model.rotary_emb(embeds, position_ids(seen if padded else seen[:1]))
    mask = causal_mask(valid, length) if padded else None
    rotary = (cos[:, :length].contiguous(), sin[:, :length].contiguous())  # compiled code depends on strides
    layers = decoder_layers(model)
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        # The final layer is computed at the last position only: nothing reads the others.
        queries = 1 if layer is layers[-1] else length
        query, key, value = layer_pass.project(layer, embeds, rotary, queries)
        keys[:, :, :length], values[:, :, :length] = key, value
        key, value = keys[:, :, :length], values[:, :, :length]  # from here on in the cache alone
        layer_mask = None if mask is None else mask[:, :, -queries:]
        embeds = layer_pass.attend(layer, embeds[:, -queries:], query, key, value, layer_mask)
    return Prompt(
        cache=cache,
        length=length,
        hidden=model.norm(embeds)[:, -1],
        cos=cos[:, length:],
        sin=sin[:, length:],
        seen=seen[:, None, None, :] if padded else None,
    )


def step(model: LlamaModel, prompt: Prompt, number: int, embeds: Float[Tensor, "B 1 E"]) -> Float[Tensor, "B E"]:
    """Feed the next token, number `number` (from 0), of each row and return its normalised hidden state."""
    place = prompt.length + number
    rotary = (prompt.cos[:, number : number + 1], prompt.sin[:, number : number + 1])
    mask = None if prompt.seen is None else prompt.seen[..., : place + 1]
    for layer, keys, values in zip(decoder_layers(model), prompt.cache.keys, prompt.cache.values, strict=True):
        query, key, value = project(layer, embeds, rotary, 1)
        keys[:, :, place : place + 1] = key
        values[:, :, place : place + 1] = value
        embeds = attend(layer, embeds, query, keys[:, :, : place + 1], values[:, :, : place + 1], mask)
    return model.norm(embeds)[:, -1]
