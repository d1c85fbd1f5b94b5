"""Shared by the supervised fits, of a policy's warm start and of a reward model: optimiser, learning rate, data."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch.nn import Parameter
from torch.optim import AdamW

from reachrl.functional.schedules import decay
from reachrl.run.weight_change import check_float32

T = TypeVar("T")


def adamw(parameters: Sequence[Parameter], *, lr: float, weight_decay: float, model: str) -> AdamW:
    """AdamW whose weight decay acts on matrices only, not on biases and norms.

    Args:
        parameters: what is trained.
        lr: peak learning rate.
        weight_decay: of the matrices.
        model: the name of the model's class, for the error.

    Raises:
        ConfigError: parameters are held in 16 bits, where small steps are rounded away.
    """
    check_float32(parameters, model)
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr)


def scheduled(peak: float, step: int, *, warmup: int, end: int, final: float = 0.0) -> float:
    """The learning rate of a step: linear warm-up, then a cosine.

    Args:
        peak: after the warm-up.
        step: counted from 0.
        warmup: steps of the warm-up.
        end: the step at which the cosine ends.
        final: fraction of the peak at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * decay("cosine", min(1.0, (step - warmup) / max(1, end - warmup)), final)


def hold_out(strata: Iterable[tuple[Sequence[T], np.random.Generator]], fraction: float) -> set[T]:
    """Choose about `fraction` of each stratum: at least one where there are two, never all.

    Args:
        strata: members, and what draws among them.
        fraction: 0 <= fraction < 1; with 0 nothing is held out.
    """
    chosen: set[T] = set()
    for members, rng in strata:
        count = min(max(1, round(fraction * len(members))), len(members) - 1) if fraction > 0 else 0
        chosen.update(members[i] for i in rng.permutation(len(members))[:count])
    return chosen


def shifted(frames: UInt8[np.ndarray, "B F H W 3"], shift: Int64[np.ndarray, "B 2"]) -> UInt8[np.ndarray, "B F H W 3"]:
    """Move the content of frames by (dy, dx) pixels, down and right, repeating the edges."""
    images, offsets = torch.from_numpy(np.ascontiguousarray(frames)), torch.from_numpy(shift)
    height, width = images.shape[2:4]
    # The pixel shown at y comes from y - dy; clamping repeats the edge.
    rows = (torch.arange(height) - offsets[:, :1]).clamp_(0, height - 1)  # [B H]
    columns = (torch.arange(width) - offsets[:, 1:]).clamp_(0, width - 1)  # [B W]
    batch, clip = torch.arange(len(images)), torch.arange(images.shape[1])
    index = batch[:, None, None, None], clip[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    return images[index].numpy()
