"""Fused attention and autocast on the meta device, which has neither."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reachrl.plan.trace import Tracer

_CAST = {  # what autocast computes in the lower precision
    torch.nn.functional.linear,
    torch.nn.functional.conv2d,
    torch.nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}


@contextmanager
def on_meta(tracer: Tracer) -> Iterator[None]:
    """Trace on the meta device, with fused attention and autocast in place of those of an accelerator."""
    functions = _Functions(tracer)
    with ExitStack() as stack:
        stack.enter_context(patch("torch.autocast", functions.autocast))
        for context in (torch.device("meta"), functions, tracer):
            stack.enter_context(context)
        yield


class _Functions(TorchFunctionMode):
    """Replaces attention and autocast."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._dtype: torch.dtype | None = None
        self._last: torch.dtype | None = None
        self._casts: dict[int, Tensor] = {}

    @contextmanager
    def autocast(self, _: str, dtype: torch.dtype | None = None, enabled: bool = True, **__: Any) -> Iterator[None]:
        """Replaces `torch.autocast`."""
        before, self._dtype = self._dtype, dtype if enabled else None
        self._last = self._dtype or self._last
        try:
            yield
        finally:
            self._dtype = before
            if before is None:
                self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast the inputs of operations that autocast casts; replace attention."""
        kwargs = kwargs or {}
        dtype = self._dtype
        if dtype is None and self._last is not None and torch._C._current_graph_task_id() != -1:
            dtype = self._last  # a layer that is computed again in the backward pass
        if dtype is not None and func in _CAST:
            args = tuple(self._cast(each, dtype) for each in args)
            kwargs = {name: self._cast(each, dtype) for name, each in kwargs.items()}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if self._dtype is None:
            return value.to(dtype)
        if id(value) not in self._casts:  # trained weights are cast once in a pass
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        return _Fused.apply(self._tracer, query, key, value, attn_mask)  # pyright: ignore[reportReturnType]


class _Fused(torch.autograd.Function):
    """Fused attention: saves its inputs, its output and one number per query for the backward pass.

    Counts two matrix products in the forward pass and four in the backward pass, regardless of the mask. The
    recomputation of the scores in a fused kernel is not counted.
    """

    @staticmethod
    def forward(ctx: Any, tracer: Tracer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Count the work; return an empty output."""
        *batch, heads, length, _ = query.shape
        out = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-2, -3)
        kept = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, kept)
        ctx.tracer, ctx.flops = tracer, 2 * query.numel() * key.shape[-2] + 2 * out.numel() * key.shape[-2]
        tracer.add(ctx.flops, (query, key, value, out))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Count the work; return empty gradients."""
        query, key, value, _, out, _ = ctx.saved_tensors  # as fused kernels, positions before heads
        ctx.tracer.add(2 * ctx.flops, (query, key, value, out), times=2)
        grads = (each.transpose(-2, -3).new_empty(each.transpose(-2, -3).shape) for each in (query, key, value))
        return None, *(each.transpose(-2, -3) for each in grads), None
