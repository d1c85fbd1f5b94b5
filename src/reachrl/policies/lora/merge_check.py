"""Check of merged files: every number equals base plus adapters, by independent arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from reachrl.errors import CheckpointError
from reachrl.policies.lora.deltas import deltas
from reachrl.policies.storage.weights import weight_files

_UNIT = 2.0**-24  # half the spacing of float32 beside 1: the error of one operation


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCheck:
    """Result of comparing merged files with base plus adapter products in float64."""

    num_weights: int  # that have adapters
    error: float  # the largest of a number, over what rounding it once explains; at most 1
    change: float  # of the adapted weights: length of what was added over the length of what there was


class _Delta(NamedTuple):
    a: Tensor
    b: Tensor
    scale: float


def check_merged(
    folder: Path, base: Path, out: Path, name_of: Callable[[str], str], replaced: Mapping[str, Tensor]
) -> MergeCheck:
    """Read merged files and compare each weight with the base's plus the product of the adapter matrices.

    The arguments are those of `merge_files`.

    Raises:
        CheckpointError: a number is further away than rounding it once explains, or a weight without adapters is not
            the base's.
    """
    pairs = {name: _Delta(*delta) for name, delta in deltas(folder, name_of).items()}
    worst, squares, added = 0.0, 0.0, 0.0
    for path in weight_files(base):
        with safe_open(path, framework="pt") as theirs, safe_open(out / path.name, framework="pt") as ours:
            for key in theirs.keys():  # noqa: SIM118  (not a dictionary)
                weight, merged, delta = theirs.get_tensor(key), ours.get_tensor(key), pairs.get(name_of(key))
                if delta is not None:
                    product = delta.scale * (delta.b.double().flatten(1) @ delta.a.double().flatten(1))
                    error = _error(weight, merged, product.view(weight.shape), delta)
                    worst = max(worst, error)
                    squares += weight.double().square().sum().item()
                    added += product.square().sum().item()
                else:
                    error = 0.0 if torch.equal(merged, replaced.get(key, weight)) else torch.inf
                if not error <= 1:
                    raise CheckpointError(
                        f"merging {folder}: the weight {key} is further from its base and the adapters' product than "
                        f"rounding explains ({error:.3g} times as far). Nothing was written; merge with peft's "
                        "merge_and_unload, and report this"
                    )
    return MergeCheck(num_weights=len(pairs), error=worst, change=(added / squares) ** 0.5 if squares else 0.0)


def _error(weight: Tensor, merged: Tensor, product: Tensor, delta: _Delta) -> float:
    """Return the largest error of a merged weight, relative to the rounding error that the arithmetic allows."""
    if merged.dtype != weight.dtype or merged.shape != weight.shape:
        return torch.inf
    kind, expected = torch.finfo(weight.dtype), weight.double() + product
    # In float32: a product of `rank` terms, its scale and one sum; then one rounding to the stored type.
    terms = abs(delta.scale) * (delta.b.float().abs().flatten(1) @ delta.a.float().abs().flatten(1))
    sums = _UNIT * ((len(delta.a) + 4) * terms.view(weight.shape) + 2 * weight.float().abs())
    allowed = sums.double() + 0.51 * kind.eps * expected.abs() + kind.smallest_normal * kind.eps
    return ((merged.double() - expected).abs() / allowed).max().item()
