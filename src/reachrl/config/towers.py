"""Options of the vision towers."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from reachrl.config.base import Section


def _patches(image_size: int, side: int, name: str) -> int:
    """Patches of `side` pixels along an image; `name` says where the side comes from."""
    if image_size % side:
        fits = f"{max(image_size // side, 1) * side} or {(max(image_size // side, 1) + 1) * side}"
        raise ValueError(f"image_size={image_size} is not a multiple of {side} ({name}); set it to {fits}, for example")
    return image_size // side


class ViTTowerConfig(Section):
    """A vision transformer with the official parameter names (DINOv2 or SigLIP)."""

    kind: Literal["vit"] = "vit"
    """Plain patch embedding followed by transformer blocks."""
    width: int = Field(gt=0)
    """Channels of a patch."""
    depth: int = Field(ge=2)
    """Blocks of the official tower. The last one is never read, so it is never built."""
    num_heads: int = Field(gt=0)
    """Attention heads; must divide `width`."""
    mlp_width: int = Field(gt=0)
    """Hidden units of a block's MLP."""
    patch_size: int = Field(default=14, gt=0)
    """Side of a patch in pixels; must divide the image size."""
    num_registers: int = Field(default=0, ge=0)
    """Register tokens in front of the patches (DINOv2 reg4 has 4)."""
    class_token: bool = False
    """Whether a class token comes first (DINOv2)."""
    layer_scale: bool = False
    """Whether each residual branch has a learned scale (DINOv2)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width}")
        return self

    @property
    def output_width(self) -> int:
        """Channels of one patch in the tower's output."""
        return self.width

    def grid(self, image_size: int) -> int:
        """Patches along one side of an image of `image_size` pixels."""
        return _patches(image_size, self.patch_size, "patch_size")


class ConvStage(Section):
    """One strided convolution of a convolutional tower, followed by GroupNorm and (but for the last) GELU."""

    channels: int = Field(gt=0)
    """Output channels; a multiple of 8 (the groups of the normalisation)."""
    kernel: int = Field(default=3, gt=0)
    """Side of the kernel in pixels of the stage's input."""
    stride: int = Field(default=2, gt=0)
    """By how much the stage shrinks the grid."""

    @model_validator(mode="after")
    def _channels_in_groups(self) -> Self:
        if self.channels % 8:
            raise ValueError(f"channels={self.channels} is not a multiple of 8")
        if self.kernel < self.stride:
            raise ValueError(f"kernel={self.kernel} is smaller than stride={self.stride}: pixels would be skipped")
        if self.stride == 1 and self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} with stride 1 would change the grid; use an odd kernel")
        return self


class ConvTowerConfig(Section):
    """A convolutional tower: learns from scratch on few data much faster than plain patch embedding."""

    kind: Literal["conv"] = "conv"
    """Strided convolutions down to the patch grid, plus a learned position embedding."""
    stages: tuple[ConvStage, ...] = Field(min_length=1)
    """The convolutions, first to last; the product of their strides is the patch size."""

    @property
    def output_width(self) -> int:
        """Channels of one patch in the tower's output."""
        return self.stages[-1].channels

    def grid(self, image_size: int) -> int:
        """Patches along one side of an image of `image_size` pixels."""
        strides = " * ".join(str(stage.stride) for stage in self.stages)
        return _patches(image_size, math.prod(stage.stride for stage in self.stages), f"the strides {strides}")


TowerConfig = Annotated[ViTTowerConfig | ConvTowerConfig, Field(discriminator="kind")]

TINY_TOWER = ConvTowerConfig(
    stages=(
        ConvStage(channels=32, kernel=7, stride=4),
        ConvStage(channels=64, kernel=3, stride=2),
        ConvStage(channels=128, kernel=5, stride=3),
    )
)
