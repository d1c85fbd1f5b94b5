"""Frames to pixels: resize as the released image processor does, then normalise once for each tower."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def resize_naive(images: UInt8[np.ndarray, "N H W 3"], size: int) -> UInt8[np.ndarray, "N S S 3"]:
    """Bicubic resize with antialiasing straight to a square, without keeping the aspect ratio.

    Frames that already have the right size are returned as they are.
    """
    if images.shape[1:3] == (size, size):
        return images
    from PIL import Image  # only frames of another size need it

    resized = [
        Image.fromarray(image).resize((size, size), resample=Image.Resampling.BICUBIC, reducing_gap=None)
        for image in images
    ]
    return np.stack([np.asarray(image) for image in resized])


def normalise_pixels(
    images: UInt8[np.ndarray, "N S S 3"],
    means: Sequence[Sequence[float]],
    stds: Sequence[Sequence[float]],
    device: torch.device | str = "cpu",
) -> Float[Tensor, "N C S S"]:
    """Stack the same RGB image once per tower, each with that tower's statistics.

    Args:
        images: RGB frames, 0..255.
        means: one RGB triple per tower, in 0..1.
        stds: one RGB triple per tower, in 0..1.
        device: where to compute; the frames travel there as bytes.

    Returns:
        f32 [N, 3 * towers, S, S].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    # the order of operations of torchvision's ToTensor and Normalize: results are equal to the last bit
    unit = pixels.contiguous().float().div_(255)
    out = torch.empty((unit.shape[0], 3 * len(means), *unit.shape[2:]), device=unit.device)
    for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
        mean_rgb = torch.tensor(mean, device=unit.device).view(3, 1, 1)
        std_rgb = torch.tensor(std, device=unit.device).view(3, 1, 1)
        torch.sub(unit, mean_rgb, out=out[:, 3 * i : 3 * i + 3]).div_(std_rgb)
    return out
