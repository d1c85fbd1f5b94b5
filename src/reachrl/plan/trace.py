"""Traces memory and work of a pass on the meta device.

The batch size is a prime that divides no other dimension: a tensor whose size it divides grows with the batch. So one
trace is valid for any number of rows.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from reachrl.plan.passes import Pass

_PRIMES = (211, 223, 227, 229, 233, 239, 241, 251)
_LOOK_UPS = {"embedding", "index_select", "gather", "index"}  # read only the rows that they return


class Tracer(TorchDispatchMode):
    """A dispatch mode that records allocations and operations.

    Args:
        rows: batch size; `rows_for` chooses it.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.launching = True
        """Whether operations are launched one by one, not replayed from a recording."""
        self.now = (0, 0)
        """Allocated bytes: fixed, and per row."""
        self._sizes: dict[int, tuple[weakref.ref[Any], tuple[int, int]]] = {}
        self._live: list[tuple[int, int]] = []
        self._work: list[tuple[int, ...]] = []
        self._halves: list[bool] = []
        self._launched = 0
        self._known: dict[Any, tuple[Any, list[Any]]] = {}
        self._kinds: dict[Any, tuple[bool, Callable[..., int] | None, bool]] = {}

    @contextmanager
    def measure(self) -> Iterator[list[Pass]]:
        """Record the body as one pass, which is appended to the list at the end."""
        before = self.now
        self._live, self._work, self._halves, self._launched = [before], [], [], 0
        found: list[Pass] = []
        yield found
        live = np.array(self._live, np.float64) - before
        work = np.array(self._work, np.float64).reshape(-1, 2, 2)
        found.append(Pass(live, work, np.array(self._halves, bool), self._launched))

    def replayed(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Return `work`, counted as a replayed recording: one launch for all of its operations."""

        def run() -> Any:
            self.launching = False
            try:
                return work()
            finally:
                self.launching = True

        return run

    def parted(self, size: int) -> tuple[int, int]:
        """Split a size into (fixed, per row)."""
        return (size, 0) if size % self.rows else (0, size // self.rows)

    def add(self, flops: int, tensors: Iterable[Tensor], times: int = 1) -> None:
        """Record one operation that reads or writes each of `tensors` `times` times."""
        fixed = row = 0
        halves = False
        for tensor in tensors:
            # The storage of an expanded tensor is smaller than its size.
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
        """Return whether an operation moves data, its FLOP counter, and whether it reads only some rows of a table."""
        if func not in self._kinds:
            returned = [value.alias_info for value in func._schema.returns]
            views = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
            name = func.overloadpacket.__name__
            moves = not views and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
            self._kinds[func] = moves, flop_registry.get(func.overloadpacket), name in _LOOK_UPS
        return self._kinds[func]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; results of pure operations are cached by the shapes of their inputs."""
        key: Any = None
        if self._kind(func)[0] and not func._schema.is_mutable:
            try:
                key = (func, _described(args), *((name, _described((value,))) for name, value in kwargs.items()))
                known = self._known.get(key)
            except TypeError:  # unhashable
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
        """Run an operation and record its results."""
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
    """Return a prime that divides none of `dimensions`."""
    return next(prime for prime in _PRIMES if all(size % prime for size in dimensions))


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _described(values: Any) -> tuple[Any, ...]:
    """Return a hashable description of everything that decides the shapes of an operation's results."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.stride(), value.dtype, value.device))
        else:
            found.append(_described(value) if isinstance(value, list | tuple) else (type(value), value))
    return tuple(found)
