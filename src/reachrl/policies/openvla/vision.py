"""Vision towers (official ViT, or a small convolutional one) and the projector, under official parameter names."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reachrl.config.policy import PrismaticConfig
from reachrl.config.towers import ConvTowerConfig, ViTTowerConfig

_NORM_EPS = 1e-6
_NUM_GROUPS = 8


class PatchEmbed(nn.Module):
    """Non-overlapping patches as one strided convolution."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P F"]:
        """Row by row, left to right."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """A learned scale per channel of a residual branch (`gamma` in other code bases)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        """Scale the branch."""
        return x * self.scale_factor


class Attention(nn.Module):
    """Full self-attention with one fused projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        """Attend over all tokens."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two linear maps with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        """Apply to each token."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ViTTowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.attn = Attention(config.width, config.num_heads)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_width)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Float[Tensor, "B S F"]) -> Float[Tensor, "B S F"]:
        """Two residual branches."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViTTower(nn.Module):
    """A ViT read after its second-to-last block, without final norm and without prefix tokens.

    The last block, the final norm and any pooling of the official tower are never read, so they are not built.
    """

    def __init__(self, config: ViTTowerConfig, image_size: int) -> None:
        super().__init__()
        self.num_prefix_tokens = int(config.class_token) + config.num_registers
        self.patch_embed = PatchEmbed(config.width, config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid(image_size) ** 2, config.width))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        if config.num_registers:
            self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - 1))
        for name, parameter in self.named_parameters():
            if name in ("pos_embed", "cls_token", "reg_token"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P F"]:
        """Patch features of one tower."""
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if prefix:
            x = torch.cat([token.expand(x.shape[0], -1, -1) for token in prefix] + [x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.num_prefix_tokens :]


class ConvTower(nn.Module):
    """Strided convolutions, GroupNorm after each and GELU between them, plus a learned position embedding."""

    def __init__(self, config: ConvTowerConfig, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in config.stages:
            padding = (stage.kernel - stage.stride + 1) // 2
            layers += [
                nn.Conv2d(channels, stage.channels, stage.kernel, stage.stride, padding, bias=False),
                nn.GroupNorm(_NUM_GROUPS, stage.channels),
                nn.GELU(),
            ]
            channels = stage.channels
        self.stages = nn.Sequential(*layers[:-1])  # no GELU at the end: features stay centred, patches differ
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid(image_size) ** 2, channels))
        nn.init.trunc_normal_(self.pos_embed, std=0.5)  # comparable with the features: where matters as much as what
        for layer in self.stages:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P F"]:
        """Patch features of one tower."""
        # channels-last keeps convolution and normalisation on the fast CPU kernels
        x = self.stages(pixels.contiguous(memory_format=torch.channels_last))
        return x.flatten(2).transpose(1, 2) + self.pos_embed


class VisionBackbone(nn.Module):
    """One or two towers over the same image; features are concatenated patch by patch."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        names = ("featurizer", "fused_featurizer")[: len(config.towers)]
        for name, tower in zip(names, config.towers, strict=True):
            build = ViTTower if isinstance(tower, ViTTowerConfig) else ConvTower
            self.add_module(name, build(tower, config.image_size))  # pyright: ignore[reportArgumentType]

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P F"]:
        """Features of all towers; tower `i` reads channels `3 i .. 3 i + 2`."""
        towers = list(self.children())
        pixels = pixel_values.split(3, dim=1)
        return torch.cat([tower(rgb) for tower, rgb in zip(towers, pixels, strict=True)], dim=-1)


class Projector(nn.Module):
    """Maps patch features into the language model's embedding space."""

    def __init__(self, vision_width: int, hidden_size: int, expansion: int, num_towers: int) -> None:
        super().__init__()
        self.two_hidden = num_towers == 2
        first = expansion * vision_width if self.two_hidden else hidden_size
        self.fc1 = nn.Linear(vision_width, first)
        self.fc2 = nn.Linear(first, hidden_size)
        if self.two_hidden:
            self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P E"]:
        """Project each patch."""
        x = self.fc2(F.gelu(self.fc1(features)))
        return self.fc3(F.gelu(x)) if self.two_hidden else x
