"""Whether optimiser steps reach the weights: small ones are rounded away where weights are held in 16 bits."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reachrl.errors import ConfigError

ALARM = 0.5
"""A smaller share of changed weights is no accident of rounding: most of the training is lost."""
_PER_TENSOR = 256


def check_float32(parameters: Iterable[nn.Parameter], whose: str) -> None:
    """Refuse to train weights that are held in 16 bits.

    At a learning rate of 2e-5 a step is a hundredth of the distance between a bfloat16 weight of 0.02 and the next:
    nearly all weights stay where they are, without an error.

    Args:
        parameters: what an optimiser is about to be made for.
        whose: what they belong to, for the message.

    Raises:
        ConfigError: one of them is not float32 or float64.
    """
    coarse = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}
    if coarse:
        held = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse))
        raise ConfigError(
            f"{whose}: trained weights are held in {held}, in which small steps are rounded away. Hold them in "
            "float32; to compute in 16 bits all the same set policy.dtype=float32 policy.compute_dtype=bfloat16, or "
            "train adapters (policy.lora), which are float32 on any base"
        )


class WeightSample:
    """Evenly spaced elements of trained tensors, at most 256 of each, as they were before the last step.

    Of tensors that are split between processes, this process's part. Make one for each update: it looks at the
    tensors' memory as it lies now.

    Args:
        parameters: what is trained.
    """

    @torch.no_grad()
    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._places = [
            (parameter, max(1, math.ceil(local.numel() / _PER_TENSOR)), local.numel())
            for parameter in parameters
            if (local := _local(parameter)).numel()
        ]
        self._now = [_sampled(parameter, stride) for parameter, stride, _ in self._places]
        self._before = [elements.clone() for elements in self._now]

    @torch.no_grad()
    def remember(self) -> None:
        """Store the sampled weights; call it before each step."""
        if self._now:
            torch._foreach_copy_(self._before, self._now)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def changed(self, optimizer: torch.optim.Optimizer) -> float:
        """The share of weights that the step since `remember` changed, of those it was to change.

        Args:
            optimizer: of the Adam family; a weight whose running mean of gradients is 0, such as the embedding of a
                word that never occurred, was to stay.

        Returns:
            0 to 1; NaN where no weight was to change.
        """
        due, weights = [], []
        for (parameter, stride, size), now in zip(self._places, self._now, strict=True):
            mean: Tensor | None = optimizer.state.get(parameter, {}).get("exp_avg")
            due.append(torch.zeros_like(now, dtype=torch.bool) if mean is None else _sampled(mean, stride) != 0)
            weights.append(torch.full_like(now, size / len(now), dtype=torch.float64))
        if not due:
            return math.nan
        moved = torch.cat([now != before for now, before in zip(self._now, self._before, strict=True)])
        wanted = torch.cat(weights) * torch.cat(due)
        return ((wanted * moved).sum() / wanted.sum()).item()


def _sampled(tensor: Tensor, stride: int) -> Tensor:
    return _local(tensor).reshape(-1)[::stride]


def _local(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
