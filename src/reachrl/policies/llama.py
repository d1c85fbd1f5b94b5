"""Forward passes of transformers' Llama, layer by layer: for teacher forcing and for cached decoding."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, rotate_half

from reachrl.config.language_model import LanguageModelConfig
from reachrl.policies.frozen_linear import FrozenLinear

Rotary = tuple[Tensor, Tensor]
FUSED = _QKV, _GATE_UP = "fused_qkv", "fused_gate_up"
Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def build_llama(config: LanguageModelConfig) -> LlamaForCausalLM:
    """A randomly initialised `LlamaForCausalLM` of the given sizes.

    Turns off cuDNN's attention for the process: its gradients under a mask are NaN where the sequence's length modulo
    128 is 64 (pytorch/pytorch#196678), and torch prefers it on new GPUs from 2.11 on.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
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


def causal_mask(valid: Bool[Tensor, "B S"], num_queries: int) -> Bool[Tensor, "B 1 Q S"]:
    """Return the causal attention mask of the last `num_queries` positions, without padding."""
    length = valid.shape[1]
    order = torch.ones(num_queries, length, dtype=torch.bool, device=valid.device).tril(length - num_queries)
    return order & valid[:, None, None, :]


def position_ids(valid: Bool[Tensor, "B S"]) -> Tensor:
    """Return positions that count real tokens only, so that padding shifts nothing."""
    return (valid.long().cumsum(1) - 1).clamp_min_(0)


def _rotate(x: Float[Tensor, "B H S D"], rotary: Rotary) -> Float[Tensor, "B H S D"]:
    """Apply the rotary position embedding."""
    cos, sin = rotary
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def fuse(layer: LlamaDecoderLayer) -> None:
    """Fuse layers that read the same input into one matrix, of which their weights become views.

    For the decoding copy. The weights are uninitialised afterwards: copy them again.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for owner, name, parts in (
        (attention, _QKV, ("q_proj", "k_proj", "v_proj")),
        (mlp, _GATE_UP, ("gate_proj", "up_proj")),
    ):
        maps = [cast(FrozenLinear, getattr(owner, part)) for part in parts]
        fused = type(maps[0]).empty(sum(each.out_features for each in maps), maps[0].in_features, like=maps[0].weight)
        for part, view in zip(parts, fused.split([each.out_features for each in maps]), strict=True):
            setattr(owner, part, view)
        setattr(owner, name, fused)


def project(
    layer: LlamaDecoderLayer, hidden: Float[Tensor, "B S E"], rotary: Rotary, num_queries: int
) -> tuple[Float[Tensor, "B H Q D"], Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
    """Compute queries of the last `num_queries` positions, and keys and values of all, with rotary embeddings."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    fused: FrozenLinear | None = getattr(attention, _QKV, None)
    if fused is None or num_queries < hidden.shape[1]:
        # Queries last: the order in which gradients are summed is part of published numbers.
        key, value = attention.k_proj(normed), attention.v_proj(normed)
        last = normed if num_queries == normed.shape[1] else normed[:, -num_queries:]
        query = attention.q_proj(last)
    else:
        rows = [linear.out_features for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        query, key, value = fused(normed).split(rows, -1)
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (query, key, value))
    key = _rotate(key, rotary)
    if num_queries < hidden.shape[1]:
        rotary = (rotary[0][:, -num_queries:], rotary[1][:, -num_queries:])
    return _rotate(query, rotary), key, value


def _feed_forward(mlp: LlamaMLP, x: Float[Tensor, "B Q E"]) -> Float[Tensor, "B Q E"]:
    fused: FrozenLinear | None = getattr(mlp, _GATE_UP, None)
    if fused is None:
        return mlp(x)
    gate, up = fused(x).chunk(2, -1)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def attend(
    layer: LlamaDecoderLayer,
    hidden: Float[Tensor, "B Q E"],
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S D"],
    mask: Bool[Tensor, "B 1 Q S"] | None,
    causal: bool = True,
) -> Float[Tensor, "B Q E"]:
    """Compute attention and feed-forward, each with its residual connection, from a layer's projections.

    Without a mask the rows have no padding, and causal attention has one query or one per key.
    """
    attention = layer.self_attn
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None and query.shape[2] > 1,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + _feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))


class LayerPass(NamedTuple):
    """The two halves of a decoder layer, before and after keys and values are written to a cache."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attend: Callable[..., Tensor]


PLAIN = LayerPass(project, attend)


@functools.cache
def compiled() -> LayerPass:
    """Compile the halves for the first shape, and once more for all others (dynamic shapes).

    A layer's parameters are inputs of the compiled functions, so that all layers share them.
    """
    return LayerPass(torch.compile(project), torch.compile(attend))


def has_padding(valid: Bool[Tensor, "B S"]) -> bool:
    """Return whether a mask is needed; always on an accelerator, because reading it would synchronise."""
    return valid.device.type != "cpu" or not bool(valid.all())


def last_hidden(
    model: LlamaModel,
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    num_last: int,
    recompute: Contexts | None = None,
    *,
    causal: bool = True,
) -> Float[Tensor, "B Q E"]:
    """Compute normalised hidden states of the last `num_last` positions, with gradients.

    The final layer computes only those positions.

    Args:
        model: the language model without its head.
        embeds: token and patch embeddings.
        valid: which positions are real tokens; of causal attention the last `num_last` must be.
        num_last: how many positions to return.
        recompute: layers are computed again in the backward pass instead of being kept; it makes the contexts of
            the two passes.
        causal: whether a position attends to those before it alone, or to all real ones.

    Returns:
        Hidden states after the final normalisation.
    """
    length = embeds.shape[1]
    padded = has_padding(valid)
    rotary: Rotary = model.rotary_emb(embeds, position_ids(valid if padded else valid[:1]))
    mask = _seen(valid, length, causal) if padded else None
    inputs: dict[str, Any] = {"attention_mask": mask, "position_embeddings": rotary} | (
        {} if causal else {"is_causal": False}
    )
    *first_layers, final_layer = decoder_layers(model)
    for layer in first_layers:  # whole modules are called: their hooks (sharding) must run
        if recompute is not None and torch.is_grad_enabled():
            embeds = checkpoint(layer, embeds, use_reentrant=False, context_fn=recompute, **inputs)
        else:
            embeds = layer(embeds, **inputs)
    needs_mask = padded or (causal and 1 < num_last < length)
    last_mask = _seen(valid, num_last, causal) if needs_mask else None
    query, key, value = project(final_layer, embeds, rotary, num_last)
    return model.norm(attend(final_layer, embeds[:, -num_last:], query, key, value, last_mask, causal))


def _seen(valid: Bool[Tensor, "B S"], num_queries: int, causal: bool) -> Bool[Tensor, "B 1 Q S"]:
    """Return the attention mask of the last `num_queries` positions."""
    return causal_mask(valid, num_queries) if causal else valid[:, None, None, :].expand(-1, 1, num_queries, -1)


@torch.no_grad()
def acting_hidden(
    model: LlamaModel,
    embeds: Float[Tensor, "B S E"],
    valid: Bool[Tensor, "B S"],
    num_last: int,
    *,
    layer_pass: LayerPass = PLAIN,
) -> Float[Tensor, "B Q E"]:
    """`last_hidden` with attention in both directions, of a copy for acting: its fused maps, and no modules' hooks.

    Args:
        model: the language model without its head.
        embeds: token and patch embeddings.
        valid: which positions are real tokens.
        num_last: how many positions to return.
        layer_pass: computes the layers.
    """
    padded = has_padding(valid)
    cos, sin = model.rotary_emb(embeds, position_ids(valid if padded else valid[:1]))
    layers, length = decoder_layers(model), embeds.shape[1]
    for layer in layers:
        queries = num_last if layer is layers[-1] else length
        query, key, value = layer_pass.project(layer, embeds, (cos, sin), queries)
        mask = _seen(valid, queries, causal=False) if padded else None
        embeds = layer_pass.attend(layer, embeds[:, -queries:], query, key, value, mask, False)
    return model.norm(embeds)
