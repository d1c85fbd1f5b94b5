"""Frozen linear layers in 4 bits; the only file that imports bitsandbytes.

Source: Dettmers et al. 2023, QLoRA, section 3: NF4 in blocks of 64 weights, whose scales are quantised in turn.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reachrl.config.policy import NF4_BLOCK
from reachrl.errors import ConfigError, MissingExtra


def library() -> ModuleType:
    """Import bitsandbytes.

    Raises:
        MissingExtra: it is not installed, or does not run here.
    """
    try:
        with _without_downloaded_kernels():
            import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # the last two: a library of its own that does not load
        raise MissingExtra(
            f"policy.lora.base=nf4 needs bitsandbytes ({error}); run  pip install 'reachrl[quantised]', or set "
            "policy.lora.base=plain"
        ) from error
    return bitsandbytes


@contextmanager
def _without_downloaded_kernels() -> Iterator[None]:
    """Keep bitsandbytes from fetching native code from the hub as it is imported, and from warning that it could not.

    On CPUs with bfloat16 instructions it asks the package `kernels` for a product that `make_room` turns off anyway.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, found = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if found is not None:
            sys.modules["kernels"] = found


def make_room(
    policy: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype, compute: torch.dtype
) -> dict[str, Any]:
    """Replace the linear layers of the decoder layers by empty 4-bit layers.

    Args:
        policy: whose maps may be without storage.
        prefix: how the names of the decoder layers begin.
        device: where a map's weight is quantised and kept.
        dtype: what a weight is rounded to before it is quantised, as it would be held without.
        compute: type of the products.

    Returns:
        For the name of each weight, the function that quantises and stores it.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        ConfigError: a map has a bias.
    """
    bnb = library()
    fill: dict[str, Callable[[Tensor], None]] = {}
    for name, old in list(policy.named_modules()):
        if not (name.startswith(prefix) and isinstance(old, nn.Linear)):
            continue
        if old.bias is not None:
            raise ConfigError(f"policy.lora.base=nf4: {name} has a bias, which 4-bit maps do not; set lora.base=plain")
        sizes = (old.in_features, old.out_features)
        linear = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=compute, quant_type="nf4", device="meta")
        linear.weight = None
        linear.train(old.training)
        # On some CPUs it would lay the weights out anew and multiply in bfloat16, but only without gradients: acting
        # and training would be two functions, and what is saved of the weights would no longer be readable.
        linear.support_avx512bf16_for_cpu = False
        linear.register_forward_pre_hook(_in_compute_type)
        parent, _, leaf = name.rpartition(".")
        setattr(policy.get_submodule(parent), leaf, linear)
        fill[f"{name}.weight"] = partial(quantise, linear, device=device, dtype=dtype)
    return fill


def outline(policy: nn.Module, prefix: str, dtype: torch.dtype, compute: torch.dtype) -> None:
    """Replace the linear layers of the decoder layers by 4-bit layers on the meta device, for planning.

    Args:
        policy: on the meta device.
        prefix: how the names of the decoder layers begin.
        dtype: of the weights before they are quantised.
        compute: type of the products.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    tables, meta = library().functional, torch.device("meta")
    with torch.device("cpu"):  # what scales are quantised to is computed once, from numbers
        tables.name2qmap.setdefault("dynamic", tables.create_dynamic_map())
    shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
    for name, fill in make_room(policy, prefix, meta, dtype, compute).items():
        fill(torch.empty(shapes[name], dtype=dtype, device=meta))
        linear = policy.get_submodule(name.removesuffix(".weight"))
        linear.forward = partial(_Decoding.apply, linear)


class _Decoding(torch.autograd.Function):
    """A 4-bit product without a fused kernel: dequantised anew in the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, linear: nn.Module, x: Tensor) -> Tensor:
        """`x W^T`."""
        ctx.linear = linear
        return nn.functional.linear(x, dense_weight(linear))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """Compute the gradient of the input; the weight has none."""
        return None, grads[0] @ dense_weight(ctx.linear)


def _in_compute_type(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast inputs to the autocast type, which bitsandbytes ignores: its layers would return their input's type."""
    return (inputs[0].to(linear.compute_dtype),)


@torch.no_grad()
def quantise(linear: Any, weight: Tensor, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give an empty 4-bit map its weight, of which 4 bits a number are kept.

    Args:
        linear: made by `make_room`.
        weight: [out, in], anywhere, in any type.
        device: where to.
        dtype: what it is rounded to first.
    """
    bnb = library()
    assert linear.weight is None  # quantising what was quantised would lose more
    whole = weight.to(device, dtype).contiguous()
    options: dict[str, Any] = {"blocksize": NF4_BLOCK, "compress_statistics": True, "quant_type": "nf4"}
    packed, state = bnb.functional.quantize_4bit(whole, **options)
    state.dtype = linear.compute_dtype  # what the backward pass and `dense_weight` decode to
    linear.weight = bnb.nn.Params4bit(packed, quant_state=state, module=linear, bnb_quantized=True, **options)
    linear.quant_state = state


def is_four_bit(linear: nn.Module) -> bool:
    """Return whether a linear layer is in 4 bits."""
    return getattr(linear.weight, "quant_state", None) is not None


def weight_dtype(linear: nn.Module) -> torch.dtype:
    """Return the data type of `dense_weight`."""
    kind: Any = linear
    return kind.compute_dtype if is_four_bit(linear) else kind.weight.dtype


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight [out, in] of a linear layer; of a 4-bit one dequantised, in the type of its products."""
    weight: Any = linear.weight
    if not is_four_bit(linear):
        return weight
    return library().functional.dequantize_4bit(weight.data, weight.quant_state)
