"""Light augmentation of uint8 frames: a shift with repeated edges, then brightness, contrast and colour jitter."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from reachrl.config.demos import SFTSection
from reachrl.fitting import shifted


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Augmentation parameters of `B` frames."""

    shift: Int64[np.ndarray, "B 2"]  # content moves by (dy, dx) pixels: down, right
    gain: Float32[np.ndarray, "B 3"]  # factor of each channel
    contrast: Float32[np.ndarray, "B"]  # factor of the distance from the frame's mean
    offset: Float32[np.ndarray, "B"]  # added last, in 0..255 units


def sample_jitter(config: SFTSection, batch: int, rng: np.random.Generator) -> Jitter:
    """Draw the augmentation of `batch` frames; always the same draws for the same generator state."""

    def around(centre: float, width: float, shape: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(centre - width, centre + width, shape).astype(np.float32)

    return Jitter(
        shift=rng.integers(-config.shift_pixels, config.shift_pixels + 1, (batch, 2)),
        gain=around(1.0, config.colour, (batch, 3)),
        contrast=around(1.0, config.contrast, (batch,)),
        offset=around(0.0, config.brightness * 255.0, (batch,)),
    )


def apply_jitter(frames: UInt8[np.ndarray, "B H W 3"], jitter: Jitter) -> UInt8[np.ndarray, "B H W 3"]:
    """Shift frames and change their light; vectorised over the batch, result rounded and clipped to 0..255.

    A frame `x` becomes `(gain * x - mean) * contrast + mean + offset`, `mean` being that of `gain * x`.
    """
    images = torch.from_numpy(shifted(frames[:, None], jitter.shift)[:, 0])
    # One affine map per frame and channel: scale * x + bias.
    scale = torch.from_numpy(jitter.gain * jitter.contrast[:, None])  # [B 3]
    light = images.float()
    mean = (light.mean(dim=(1, 2)) * torch.from_numpy(jitter.gain)).mean(dim=1)  # [B]
    bias = mean * (1 - torch.from_numpy(jitter.contrast)) + torch.from_numpy(jitter.offset)
    light.mul_(scale[:, None, None, :]).add_(bias[:, None, None, None])
    return light.round_().clamp_(0, 255).to(torch.uint8).numpy()


def augment(
    frames: UInt8[np.ndarray, "B H W 3"], config: SFTSection, rng: np.random.Generator
) -> UInt8[np.ndarray, "B H W 3"]:
    """Augment each frame on its own, as `config` says; with every strength at zero the frames come back as they are."""
    if config.shift_pixels == 0 and not (config.brightness or config.contrast or config.colour):
        return frames
    return apply_jitter(frames, sample_jitter(config, len(frames), rng))
