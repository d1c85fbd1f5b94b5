"""Linear layers for inference whose weights are copied in: unchanged, or quantised to 8 bits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reachrl.config.policy import check_float8

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class FrozenLinear(nn.Module):
    """A linear map whose weight is copied in; it may be a part of a larger one, or fall into such parts.

    Args:
        weight: [out, in], kept as it is.
        bias: [out], kept as it is.
    """

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(cls, out_features: int, in_features: int, *, like: Tensor, bias: bool = False) -> "FrozenLinear":
        """Allocate an empty layer on the device and in the data type of `like`."""
        return cls(like.new_empty(out_features, in_features), like.new_empty(out_features) if bias else None)

    @staticmethod
    def check(device: torch.device) -> None:
        """Accept any device."""

    def split(self, rows: Sequence[int]) -> list["FrozenLinear"]:
        """Split into layers of the given output sizes, whose weights are views of this layer's."""
        return [type(self)(weight) for weight in self.weight.detach().split(list(rows))]

    @torch.no_grad()
    def give(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None) -> None:
        """Copy the weight."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """`x W^T + b`."""
        return F.linear(x, self.weight, self.bias)


class Float8Linear(FrozenLinear):
    """A linear layer in 8 bits (E4M3), with one scale per output channel and one per input row.

    Half the memory, and on hardware that multiplies 8-bit numbers up to twice the speed, for an error of a few
    percent of an output's spread, which varies from input to input. Sums are kept in more bits.

    Source: Micikevicius et al. 2022, FP8 formats for deep learning, sections 3 and 4 (E4M3, scaling).
    """

    scale: Tensor  # f32[O]

    def __init__(
        self,
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, "O"] | None = None,
        scale: Float[Tensor, "O"] | None = None,
    ) -> None:
        assert bias is None
        super().__init__(weight.to(torch.float8_e4m3fn))
        ones = torch.ones(self.out_features, device=weight.device)
        self.register_buffer("scale", ones if scale is None else scale)

    @staticmethod
    def check(device: torch.device) -> None:
        """Check that the device multiplies 8-bit numbers; a CPU does so slowly.

        Raises:
            ConfigError: a GPU without such tensor cores.
        """
        if device.type == "cuda":
            check_float8(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))

    def split(self, rows: Sequence[int]) -> list["FrozenLinear"]:
        """Split into layers of the given output sizes, whose weights and scales are views of this layer's."""
        pairs = zip(self.weight.detach().split(list(rows)), self.scale.split(list(rows)), strict=True)
        return [type(self)(weight, None, scale) for weight, scale in pairs]

    @torch.no_grad()
    def give(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None) -> None:
        """Quantise the weight to 8 bits and copy it."""
        assert bias is None
        rounded, scale = _to_float8(weight)
        self.weight.copy_(rounded)
        self.scale.copy_(scale[:, 0])

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """`x W^T`, both rounded to 8 bits; on a GPU in bfloat16, on a CPU in the type of `x`."""
        rounded, scale = _to_float8(x.flatten(0, -2))
        kind = torch.bfloat16 if x.is_cuda else x.dtype  # most GPUs give no other with scales by row
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rounded, self.weight.t(), scale_a=scale, scale_b=self.scale[None], out_dtype=kind, use_fast_accum=True
        )
        return out.unflatten(0, x.shape[:-1])


def _to_float8(x: Float[Tensor, "B I"]) -> tuple[Tensor, Float[Tensor, "B 1"]]:
    """Scale each row to the largest representable value; return scaled rows and scales."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return x.to(torch.float32, copy=True).div_(scale).to(torch.float8_e4m3fn), scale
