"""Memory and work of a pass, recorded while a policy computes on the meta device: shapes without numbers.

Rows are told apart from everything else by their count, a prime that divides nothing else: a tensor whose size it
divides has one part for each row. So one recording holds for any number of rows.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from reachrl.plan.device import Device

_PRIMES = (211, 223, 227, 229, 233, 239, 241, 251)
_LOOK_UPS = {"embedding", "index_select", "gather", "index"}  # read as much as they return, not the whole table
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


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over any number of rows needs; each line of an array is a fixed number and one for each row."""

    live: np.ndarray
    """f64[E 2], bytes alive after each allocation, less what was alive before the pass."""
    work: np.ndarray
    """f64[O 2 2], FLOPs and bytes moved by each operation."""
    halves: np.ndarray
    """bool[O], whether an operation computes in numbers of at most two bytes."""
    launched: int
    """Operations that are started one by one."""

    def peak(self, rows: float) -> float:
        """Bytes at the worst moment of a pass over `rows` rows."""
        return float((self.live @ (1, rows)).max())

    def flops(self, rows: float) -> float:
        """Floating-point operations of matrix products and convolutions, and nothing else."""
        return float((self.work[:, 0] @ (1, rows)).sum())

    def moved(self, rows: float) -> float:
        """Bytes that the operations read and write."""
        return float((self.work[:, 1] @ (1, rows)).sum())

    def seconds(self, rows: float, device: Device, *, training: bool = False) -> float:
        """Seconds of one pass: each operation takes as long as its arithmetic or its bytes, whichever is longer.

        Args:
            rows: of the pass.
            device: peak figures and the share of them that is reached.
            training: whether gradients are computed.

        Source: Williams et al. 2009, Roofline, section 3.
        """
        share = device.training_share if training else device.forward_share
        peak = 1e12 * np.where(self.halves, device.bf16, device.fp32)
        arithmetic = self.work[:, 0] @ (1, rows) / (share * peak)
        transfers = self.work[:, 1] @ (1, rows) / (device.bandwidth_share * 1e9 * device.bandwidth)
        return max(float(np.maximum(arithmetic, transfers).sum()), self.launched * device.launch_s)


class Tracer(TorchDispatchMode):
    """Records what is alive and what is computed while it is on.

    Args:
        rows: of the batch; `rows_for` chooses them.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.launching = True
        """Whether operations are started one by one, not replayed from a recording."""
        self.now = (0, 0)
        """Bytes that are alive: fixed ones, and those of each row."""
        self._sizes: dict[int, tuple[weakref.ref[Any], tuple[int, int]]] = {}
        self._live: list[tuple[int, int]] = []
        self._work: list[tuple[int, ...]] = []
        self._halves: list[bool] = []
        self._launched = 0
        self._known: dict[Any, tuple[Any, list[Any]]] = {}
        self._kinds: dict[Any, tuple[bool, Callable[..., int] | None, bool]] = {}

    @contextmanager
    def measure(self) -> Iterator[list[Pass]]:
        """Put what happens inside into the list, as one pass."""
        before = self.now
        self._live, self._work, self._halves, self._launched = [before], [], [], 0
        found: list[Pass] = []
        yield found
        live = np.array(self._live, np.float64) - before
        work = np.array(self._work, np.float64).reshape(-1, 2, 2)
        found.append(Pass(live, work, np.array(self._halves, bool), self._launched))

    def replayed(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` as if it were recorded and started in one piece."""

        def run() -> Any:
            self.launching = False
            try:
                return work()
            finally:
                self.launching = True

        return run

    def parted(self, size: int) -> tuple[int, int]:
        """A number as its fixed part and its part for each row."""
        return (size, 0) if size % self.rows else (0, size // self.rows)

    def add(self, flops: int, tensors: Iterable[Tensor], times: int = 1) -> None:
        """Note one operation, which reads or writes each of `tensors` so many times."""
        fixed = row = 0
        halves = False
        for tensor in tensors:
            # Bytes that a tensor repeats without holding them count once.
            size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
            if size % self.rows:
                fixed += size
            else:
                row += size // self.rows
            halves = tensor.element_size() <= 2
        self._work.append((*self.parted(flops), times * fixed, times * row))
        self._halves.append(halves)
        self._launched += self.launching

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self.parted(storage.nbytes())

        def free(_: object) -> None:
            _, (fixed, row) = self._sizes.pop(key)
            self.now = (self.now[0] - fixed, self.now[1] - row)

        self._sizes[key] = (weakref.ref(storage, free), size)
        self.now = (self.now[0] + size[0], self.now[1] + size[1])
        self._live.append(self.now)

    def _kind(self, func: Any) -> tuple[bool, Callable[..., int] | None, bool]:
        """Whether an operation moves data, what counts its FLOPs, and whether it looks up few rows of a table."""
        if func not in self._kinds:
            returned = [value.alias_info for value in func._schema.returns]
            views = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
            name = func.overloadpacket.__name__
            moves = not views and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
            self._kinds[func] = moves, flop_registry.get(func.overloadpacket), name in _LOOK_UPS
        return self._kinds[func]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; one that has been run on the same shapes is not asked again what it returns."""
        key: Any = None
        if self._kind(func)[0] and not func._schema.is_mutable:
            try:
                key = (func, _described(args), *((name, _described((value,))) for name, value in kwargs.items()))
                known = self._known.get(key)
            except TypeError:  # something that cannot be a key
                key = known = None
            if known is not None:
                made = [torch.empty_strided(*like[:2], dtype=like[2], device="meta") for like in known[1]]
                return made[0] if known[0] is Tensor else known[0](made)
        out = func(*args, **kwargs)
        single, made = isinstance(out, Tensor), _tensors((out,))
        old = {each.untyped_storage()._cdata for each in _tensors((args, *kwargs.values()))}
        new = all(each.is_meta and each.untyped_storage()._cdata not in old for each in made)
        if key is not None and new and (single or (type(out) in (tuple, list) and len(made) == len(out))):
            shapes = [(tuple(each.shape), each.stride(), each.dtype) for each in made]
            self._known[key] = (Tensor if single else type(out), shapes)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it returned."""
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs)
        tensors = _tensors((out,))
        for tensor in tensors:
            self._track(tensor)
        moves, flops, looks_up = self._kind(func)
        if moves:
            read = tensors if looks_up else _tensors((args, *kwargs.values()))
            self.add(flops(*args, **kwargs, out_val=out) if flops else 0, [*tensors, *read])
        return out


def rows_for(dimensions: set[int]) -> int:
    """A number of rows that divides none of `dimensions`."""
    return next(prime for prime in _PRIMES if all(size % prime for size in dimensions))


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among nested values."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _described(values: Any) -> tuple[Any, ...]:
    """What decides the shapes that an operation returns."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.stride(), value.dtype, value.device))
        else:
            found.append(_described(value) if isinstance(value, list | tuple) else (type(value), value))
    return tuple(found)


@contextmanager
def on_meta(tracer: Tracer) -> Iterator[None]:
    """Modules without storage, with fused attention and mixed precision, which that device does not know."""
    functions = _Functions(tracer)
    with ExitStack() as stack:
        stack.enter_context(patch("torch.autocast", functions.autocast))
        for context in (torch.device("meta"), functions, tracer):
            stack.enter_context(context)
        yield


class _Functions(TorchFunctionMode):
    """Attention and autocast as on an accelerator."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._dtype: torch.dtype | None = None
        self._last: torch.dtype | None = None
        self._casts: dict[int, Tensor] = {}

    @contextmanager
    def autocast(self, _: str, dtype: torch.dtype | None = None, enabled: bool = True, **__: Any) -> Iterator[None]:
        """Stands for `torch.autocast`."""
        before, self._dtype = self._dtype, dtype if enabled else None
        self._last = self._dtype or self._last
        try:
            yield
        finally:
            self._dtype = before
            if before is None:
                self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast what autocast casts; replace attention."""
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
    """Attention that keeps what a fused kernel keeps: its inputs, its output and a number for each query.

    Counted are the two products of the forward pass and the four of the backward pass, in full whatever the mask; that
    a fused kernel computes the scores again is not.
    """

    @staticmethod
    def forward(ctx: Any, tracer: Tracer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Note the work; return room for the answer."""
        *batch, heads, length, _ = query.shape
        out = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-2, -3)
        kept = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, kept)
        ctx.tracer, ctx.flops = tracer, 2 * query.numel() * key.shape[-2] + 2 * out.numel() * key.shape[-2]
        tracer.add(ctx.flops, (query, key, value, out))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Note the work; return room for the gradients."""
        query, key, value, _, out, _ = ctx.saved_tensors  # as fused kernels, positions before heads
        ctx.tracer.add(2 * ctx.flops, (query, key, value, out), times=2)
        grads = (each.transpose(-2, -3).new_empty(each.transpose(-2, -3).shape) for each in (query, key, value))
        return None, *(each.transpose(-2, -3) for each in grads), None
