"""A second trunk for decoding, with merged adapters and fused projections."""

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaModel

from reachrl.policies.decoding.recordings import CudaGraphs, Recorder, Recordings
from reachrl.policies.frozen_linear import Float8Linear, FrozenLinear
from reachrl.policies.llama import FUSED, PLAIN, LayerPass, compiled, decoder_layers, fuse
from reachrl.policies.lora.adapters import is_adapted
from reachrl.policies.lora.four_bit import dense_weight, weight_dtype
from reachrl.policies.lora.merging import merged


class RolloutCopy:
    """Projector and language model for decoding, updated whenever the trained weights have changed.

    Every linear layer is computed anew from base and adapters and rounded once, so errors do not accumulate. Modules
    other than linear layers (embeddings, norms) are shared.

    Args:
        projector: as it is trained.
        model: as it is trained.
        float8: whether the decoder layers multiply 8-bit numbers.
        records_steps: whether single-token steps are recorded, on a GPU.
        compiles_prefill: whether the decoder layers are compiled for prompts.
        recorder: of the steps, instead of CUDA graphs, for batches of any size; for planning.

    Raises:
        ConfigError: the device cannot multiply in the precision that is asked for.
    """

    def __init__(
        self,
        projector: nn.Module,
        model: LlamaModel,
        *,
        float8: bool,
        records_steps: bool,
        compiles_prefill: bool,
        recorder: Recorder | None = None,
    ) -> None:
        device = next(model.parameters()).device
        kind = Float8Linear if float8 else FrozenLinear
        kind.check(device)
        self._trained = (projector, model)
        self.projector = _frozen_copy(projector, FrozenLinear)
        self.model: LlamaModel = _frozen_copy(model, kind)  # pyright: ignore[reportAttributeAccessIssue]
        self.layer_pass: LayerPass = compiled() if compiles_prefill else PLAIN
        self.recordings: Recordings | None = None
        if device.type == "cuda" and records_steps:
            self.recordings = Recordings(CudaGraphs(device))
        elif recorder is not None and records_steps:
            self.recordings = Recordings(recorder, rounded=lambda rows: rows)
        for layer in decoder_layers(self.model):
            fuse(layer)
        for part in (self.projector, self.model):
            part.eval()  # it only decodes
        self._pairs = [
            (source, target)
            for trained, own in zip(self._trained, (self.projector, self.model), strict=True)
            for source, target in zip(_linears(trained), _linears(own), strict=True)
        ]
        self._seen: tuple[int, ...] = ()

    def update(self) -> None:
        """Copy the trained weights if any has been written to since the last call.

        Detected by PyTorch's version counters (optimiser steps, `copy_`, `load_state_dict`). Writes through
        `parameter.data` and optimisers with `fused=True` do not increment them; neither is used here.
        """
        now = tuple(p._version for module in self._trained for p in module.parameters())
        if now == self._seen:
            return
        with torch.no_grad():
            for source, target in self._pairs:
                assert isinstance(target, FrozenLinear)
                target.give(*acting_weight(source))
        self._seen = now


def _linears(module: nn.Module) -> list[nn.Module]:
    """Return linear layers in order, an adapted layer instead of its base layer."""
    found: list[nn.Module] = []
    for name, child in module.named_children():
        if name in FUSED:
            continue
        whole = any((isinstance(child, (nn.Linear, FrozenLinear)), is_adapted(child)))
        found += [child] if whole else _linears(child)
    return found


def acting_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the effective weight and bias of a linear layer with its active adapters."""
    if not is_adapted(layer):
        return dense_weight(layer), layer.bias  # pyright: ignore[reportReturnType]
    base = layer.get_base_layer()
    weight = dense_weight(base)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight = merged(weight, a, b, layer.scaling[name])  # pyright: ignore[reportArgumentType]
    return weight, base.bias  # pyright: ignore[reportReturnType]


def _frozen_copy(module: nn.Module, kind: type[FrozenLinear]) -> nn.Module:
    """Return the module without adapters, with new linear layers and all other modules shared."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    own = copy.deepcopy(module, memo=dict(shared))
    _strip(own, kind)
    return own


def _strip(module: nn.Module, kind: type[FrozenLinear]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) or is_adapted(child):
            base = child.get_base_layer() if is_adapted(child) else child
            assert isinstance(base, nn.Linear)
            like = torch.empty(0, dtype=weight_dtype(base), device=base.weight.device)
            setattr(
                module, name, kind.empty(base.out_features, base.in_features, like=like, bias=base.bias is not None)
            )
        else:
            _strip(child, kind)
