"""A second trunk to decode with: adapters folded in, projections that read the same input in one matrix."""

import copy

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaModel

from reachrl.policies.llama import decoder_layers, fuse
from reachrl.policies.openvla.four_bit import dense_weight, is_four_bit
from reachrl.policies.openvla.merging import merged


class RolloutCopy:
    """Projector and language model for decoding, brought up to date whenever the trained weights have changed.

    Every linear map is formed again from the base and the adapters and rounded once, so it does not drift however
    often that happens; what has no adapters and is no linear map (embeddings, norms) is shared, not copied.

    Args:
        projector: as it is trained.
        model: as it is trained.
    """

    def __init__(self, projector: nn.Module, model: LlamaModel) -> None:
        self._trained = (projector, model)
        self.projector = _plain_copy(projector)
        self.model: LlamaModel = _plain_copy(model)  # pyright: ignore[reportAttributeAccessIssue]
        for layer in decoder_layers(self.model):
            fuse(layer)
        self._pairs = [
            (source, target)
            for trained, own in zip(self._trained, (self.projector, self.model), strict=True)
            for source, target in zip(_linears(trained), _linears(own), strict=True)
        ]
        self._seen: tuple[int, ...] = ()

    def update(self) -> None:
        """Copy the trained weights if any has been written to since the last time.

        PyTorch counts the writes to a tensor (an optimiser's step, `copy_`, `load_state_dict`). Writing through
        `parameter.data` and optimisers with `fused=True` escape the count: neither is used here.
        """
        now = tuple(p._version for module in self._trained for p in module.parameters())
        if now == self._seen:
            return
        with torch.no_grad():
            for source, target in self._pairs:
                weight, bias = _weight(source)
                target.weight.copy_(weight)  # pyright: ignore[reportCallIssue]
                if bias is not None:
                    target.bias.copy_(bias)  # pyright: ignore[reportCallIssue]
        self._seen = now


def _linears(module: nn.Module) -> list[nn.Module]:
    """Linear maps in order, an adapted one in place of the map inside it."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, (nn.Linear, LoraLayer)) else _linears(child)
    return found


def _weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What a linear map with its active adapters multiplies by and adds."""
    if not isinstance(layer, LoraLayer):
        return dense_weight(layer), layer.bias  # pyright: ignore[reportReturnType]
    base = layer.get_base_layer()
    weight = dense_weight(base)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight = merged(weight, a, b, layer.scaling[name])  # pyright: ignore[reportArgumentType]
    return weight, base.bias  # pyright: ignore[reportReturnType]


def _plain_copy(module: nn.Module) -> nn.Module:
    """The same module without adapters: linear maps with storage of their own, everything else shared."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    own = copy.deepcopy(module, memo=dict(shared))
    _strip(own)
    return own


def _strip(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, (nn.Linear, LoraLayer)):
            base = child.get_base_layer() if isinstance(child, LoraLayer) else child
            assert isinstance(base, nn.Linear)
            dtype = base.compute_dtype if is_four_bit(base) else base.weight.dtype
            kind = {"bias": base.bias is not None, "device": base.weight.device, "dtype": dtype}
            plain = nn.utils.skip_init(nn.Linear, base.in_features, base.out_features, **kind)
            setattr(module, name, plain.requires_grad_(False))
        else:
            _strip(child)
