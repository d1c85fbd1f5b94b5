"""Memory and work of a pass, recorded while a policy computes on the meta device: shapes without numbers.

Rows are told apart from everything else by their count, a prime that divides nothing else: a tensor whose size it
divides has one part for each row. So one recording holds for any number of rows.
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
_LOOK_UPS = {"embedding", "index_select", "gather", "index"}  # read as much as they return, not the whole table


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
