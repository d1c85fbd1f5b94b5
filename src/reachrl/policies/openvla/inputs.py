"""The model-ready rows of OpenVLA: prompt tokens and pixels, or features of frozen towers in their place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from reachrl.policies.base import PolicyInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVLAInputs(PolicyInputs):
    """Either `pixel_values` or (frozen vision) the cached `vision_features`."""

    prompt_ids: Int64[Tensor, "B L"]
    prompt_mask: Bool[Tensor, "B L"]
    pixel_values: Float[Tensor, "B C H W"] | None = None
    vision_features: Float[Tensor, "B P F"] | None = None

    @classmethod
    def concat(cls, parts: Sequence[Any]) -> "PolicyInputs":
        """The rows of all `parts`; prompts are padded to the longest."""
        # A long instruction lengthens its own part only; padding changes no answer.
        length = max(part.prompt_ids.shape[1] for part in parts)

        def padded(tensor: Tensor) -> Tensor:
            return functional.pad(tensor, (0, length - tensor.shape[1]))

        alike = [
            replace(part, prompt_ids=padded(part.prompt_ids), prompt_mask=padded(part.prompt_mask)) for part in parts
        ]
        return super(OpenVLAInputs, cls).concat(alike)
