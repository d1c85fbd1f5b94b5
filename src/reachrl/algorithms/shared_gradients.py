"""Gradients and statistics of a minibatch that several processes share."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from reachrl.algorithms.base import Group

_FIGURES = ("policy_loss", "entropy", "clip_frac", "value_loss")  # means over rows; log_ratio_max beside them


def idle_passes(group: Group | None, own: int) -> int:
    """Passes that this process must add so that all processes of a sharded group make equally many.

    Args:
        group: of the learners; None for one process.
        own: passes of this process over the minibatch.
    """
    if group is None or not group.sharded:
        return 0
    most = torch.tensor([own])
    group.max_(most)
    return int(most) - own


def reduced_figures(group: Group, sums: dict[str, float]) -> dict[str, float]:
    """Sum the figures of a minibatch over the processes, and take the maximum of `log_ratio_max`."""
    figures = torch.tensor([sums[name] for name in _FIGURES], dtype=torch.float64)
    greatest = torch.tensor([sums["log_ratio_max"]], dtype=torch.float64)
    group.sum_([figures])
    group.max_(greatest)
    return dict(zip(_FIGURES, figures.tolist(), strict=True)) | {"log_ratio_max": greatest.item()}


def sum_gradients(group: Group, parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of parameters that every process holds whole."""
    reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    group.max_(reached)  # by some process: with few rows it need not be this one
    moved = [parameter for parameter, known in zip(parameters, reached.tolist(), strict=True) if known]
    for parameter in moved:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    group.sum_([parameter.grad for parameter in moved if parameter.grad is not None])


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a norm of `limit`; returns the norm before, also of sharded parameters."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
