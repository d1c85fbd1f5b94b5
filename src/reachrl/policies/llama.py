"""A walk over the layers of transformers' Llama: teacher-forced hidden states, or one cached decoding step."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, rotate_half

from reachrl.config.policy import LanguageModelConfig

Rotary = tuple[Tensor, Tensor]
Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def build_llama(config: LanguageModelConfig) -> LlamaForCausalLM:
    """A randomly initialised `LlamaForCausalLM` of the given sizes."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads or config.num_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=config.bos_token_id,
            pad_token_id=config.pad_token_id,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    llama.set_attn_implementation("sdpa")
    return llama


def decoder_layers(model: LlamaModel) -> list[LlamaDecoderLayer]:
    """The model's layers, first to last."""
    return cast(list[LlamaDecoderLayer], list(model.layers))


@dataclass(slots=True)
class KVCache:
    """Keys and values of all layers, allocated once for the whole sequence and filled from the left."""

    keys: list[Tensor]  # one [B heads S head_dim] per layer
    values: list[Tensor]

    @classmethod
    def allocate(cls, model: LlamaModel, batch: int, length: int, like: Tensor) -> "KVCache":
        """Reserve room for `length` tokens in each of `batch` rows."""
        attention = decoder_layers(model)[0].self_attn
        num_heads = attention.k_proj.out_features // attention.head_dim
        shape = (len(model.layers), 2, batch, num_heads, length, attention.head_dim)
        store = torch.empty(shape, dtype=like.dtype, device=like.device)
        return cls(keys=[layer[0] for layer in store], values=[layer[1] for layer in store])


def causal_mask(valid: Bool[Tensor, "B S"], num_queries: int) -> Bool[Tensor, "B 1 Q S"]:
    """Which keys the last `num_queries` positions may see: real tokens that do not come later."""
    length = valid.shape[1]
    order = torch.ones(num_queries, length, dtype=torch.bool, device=valid.device).tril(length - num_queries)
    return order & valid[:, None, None, :]


def position_ids(valid: Bool[Tensor, "B S"]) -> Tensor:
    """Count real tokens only, so that padding does not shift anything."""
    return (valid.long().cumsum(1) - 1).clamp_min_(0)


def _rotate(x: Float[Tensor, "B H S D"], rotary: Rotary) -> Float[Tensor, "B H S D"]:
    """Apply the rotary position embedding."""
    cos, sin = rotary
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def fuse(layer: LlamaDecoderLayer) -> None:
    """Lay the maps that read the same input out in one matrix each, of which their own weights become views.

    For layers that are not trained. The weights' contents are lost: copy them in afterwards.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for owner, name, maps in (
        (attention, "fused_qkv", (attention.q_proj, attention.k_proj, attention.v_proj)),
        (mlp, "fused_gate_up", (mlp.gate_proj, mlp.up_proj)),
    ):
        rows = [linear.weight.shape[0] for linear in maps]
        fused = maps[0].weight.new_empty(sum(rows), maps[0].weight.shape[1])
        for linear, weight in zip(maps, fused.split(rows), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(owner, name, fused)


def _project(
    attention: LlamaAttention, normed: Float[Tensor, "B S E"], num_queries: int
) -> tuple[Float[Tensor, "B Q _"], Float[Tensor, "B S _"], Float[Tensor, "B S _"]]:
    """Queries of the last `num_queries` positions, keys and values of all."""
    fused = getattr(attention, "fused_qkv", None)
    if fused is None or num_queries < normed.shape[1]:
        # Queries last: the order in which gradients are summed is part of published numbers.
        key, value = attention.k_proj(normed), attention.v_proj(normed)
        last = normed if num_queries == normed.shape[1] else normed[:, -num_queries:]
        return attention.q_proj(last), key, value
    rows = [linear.weight.shape[0] for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    query, key, value = F.linear(normed, fused).split(rows, -1)
    return query, key, value


def _feed_forward(mlp: LlamaMLP, x: Float[Tensor, "B Q E"]) -> Float[Tensor, "B Q E"]:
    fused = getattr(mlp, "fused_gate_up", None)
    if fused is None:
        return mlp(x)
    gate, up = F.linear(x, fused).chunk(2, -1)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def _attend(
    layer: LlamaDecoderLayer,
    hidden: Float[Tensor, "B S E"],
    rotary: Rotary,
    mask: Bool[Tensor, "B 1 Q K"] | None,
    num_queries: int,
    cache: KVCache | None = None,
    start: int = 0,
) -> Float[Tensor, "B Q E"]:
    """One decoder layer for the last `num_queries` positions, keys and values for all `S`.

    With a cache, the new keys and values go to positions `start .. start + S - 1`. Without a mask the rows have no
    padding, and `num_queries` is either 1 or `S`.
    """
    attention = layer.self_attn
    batch, length, _ = hidden.shape
    query, key, value = _project(attention, layer.input_layernorm(hidden), num_queries)
    key = _rotate(key.view(batch, length, -1, attention.head_dim).transpose(1, 2), rotary)
    value = value.view(batch, length, -1, attention.head_dim).transpose(1, 2)
    if num_queries < length:
        hidden = hidden[:, -num_queries:]
        rotary = (rotary[0][:, -num_queries:], rotary[1][:, -num_queries:])
    query = _rotate(query.view(batch, num_queries, -1, attention.head_dim).transpose(1, 2), rotary)
    if cache is not None:
        all_keys, all_values = cache.keys[attention.layer_idx], cache.values[attention.layer_idx]
        all_keys[:, :, start : start + length] = key
        all_values[:, :, start : start + length] = value
        key, value = all_keys[:, :, : start + length], all_values[:, :, : start + length]
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    hidden = hidden + attention.o_proj(out.transpose(1, 2).reshape(batch, num_queries, -1))
    return hidden + _feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))


def _has_padding(valid: Bool[Tensor, "B S"]) -> bool:
    """Whether a mask is needed; on an accelerator always, because looking would stall it."""
    return valid.device.type != "cpu" or not bool(valid.all())


def last_hidden(
    model: LlamaModel,
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    num_last: int,
    cache: KVCache | None = None,
    recompute: Contexts | None = None,
) -> Float[Tensor, "B Q E"]:
    """Normed hidden states of the last `num_last` positions.

    The final layer computes only those positions: nothing reads the others.

    Args:
        model: the language model without its head.
        embeds: token and patch embeddings.
        valid: which positions are real tokens; the last `num_last` must be.
        num_last: how many positions to return.
        cache: filled with the keys and values of all `S` positions when given.
        recompute: layers are computed again in the backward pass instead of being kept; it makes the contexts of
            the two passes.

    Returns:
        Hidden states after the final normalisation.
    """
    length = embeds.shape[1]
    padded = _has_padding(valid)
    positions = position_ids(valid if padded else valid[:1])
    rotary: Rotary = model.rotary_emb(embeds, positions)
    mask = causal_mask(valid, length) if padded else None
    *first_layers, final_layer = decoder_layers(model)
    for layer in first_layers:
        # Without a cache the whole module is called: its hooks (sharding) must run.
        if cache is None and recompute is not None and torch.is_grad_enabled():
            inputs = {"attention_mask": mask, "position_embeddings": rotary}
            embeds = checkpoint(layer, embeds, use_reentrant=False, context_fn=recompute, **inputs)
        elif cache is None:
            embeds = layer(embeds, attention_mask=mask, position_embeddings=rotary)
        else:
            embeds = _attend(layer, embeds, rotary, mask, length, cache)
    needs_mask = padded or 1 < num_last < length
    last_mask = causal_mask(valid, num_last) if needs_mask else None
    return model.norm(_attend(final_layer, embeds, rotary, last_mask, num_last, cache))


class CachedSteps:
    """Single-token steps behind a prompt whose keys and values are in the cache."""

    def __init__(self, model: LlamaModel, embeds: Float[Tensor, "B S E"], valid: Bool[Tensor, "B S"], steps: int):
        self.model = model
        self.cache = KVCache.allocate(model, embeds.shape[0], embeds.shape[1] + steps, embeds)
        self.hidden = last_hidden(model, embeds, valid, 1, self.cache)  # the prompt's last position
        self._length = embeds.shape[1]
        padded = _has_padding(valid)
        seen = F.pad(valid, (0, steps), value=True)
        self._seen = seen[:, None, None, :] if padded else None
        positions = position_ids(seen if padded else seen[:1])[:, self._length :]
        self._cos, self._sin = model.rotary_emb(embeds, positions) if steps else (embeds, embeds)
        self._step = 0

    def step(self, embeds: Float[Tensor, "B 1 E"]) -> Float[Tensor, "B 1 E"]:
        """Feed one more token per row and return its normed hidden state."""
        now, place = self._step, self._length + self._step
        rotary = (self._cos[:, now : now + 1], self._sin[:, now : now + 1])
        mask = None if self._seen is None else self._seen[..., : place + 1]
        for layer in decoder_layers(self.model):
            embeds = _attend(layer, embeds, rotary, mask, 1, self.cache, place)
        self._step += 1
        return self.model.norm(embeds)
