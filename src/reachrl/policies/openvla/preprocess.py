"""Frames to pixels: crop and resize as the released code does, then normalise once for each tower."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reachrl.config.policy import PrismaticConfig


def fit_frames(images: UInt8[np.ndarray, "N H W 3"], config: PrismaticConfig) -> UInt8[np.ndarray, "N S S 3"]:
    """Crop and resize frames to the square the towers see, as `config` says."""
    if config.rlds_frames:
        images = as_in_rlds(images, config.image_size)
    if config.center_crop:
        images = center_crop(images)
    if config.resize == "letterbox":
        # One image goes to both towers, so there is one colour; the official processor keeps the last tower's.
        return letterbox(images, config.image_size, [int(255 * channel) for channel in config.image_mean[-1]])
    return resize_naive(images, config.image_size)


def _bicubic(images: UInt8[np.ndarray, "N H W 3"], height: int, width: int) -> UInt8[np.ndarray, "N h w 3"]:
    """Bicubic resize with antialiasing; frames that already have the size are returned as they are."""
    if images.shape[1:3] == (height, width):
        return images
    from PIL import Image  # only frames of another size need it

    resized = [
        Image.fromarray(image).resize((width, height), resample=Image.Resampling.BICUBIC, reducing_gap=None)
        for image in images
    ]
    return np.stack([np.asarray(image) for image in resized])


def resize_naive(images: UInt8[np.ndarray, "N H W 3"], size: int) -> UInt8[np.ndarray, "N S S 3"]:
    """Bicubic resize with antialiasing straight to a square, without keeping the aspect ratio.

    Frames that already have the right size are returned as they are.
    """
    return _bicubic(images, size, size)


def letterbox(images: UInt8[np.ndarray, "N H W 3"], size: int, fill: Sequence[int]) -> UInt8[np.ndarray, "N S S 3"]:
    """Pad to a square with borders of one colour, then resize: the aspect ratio is kept.

    Args:
        images: RGB frames, 0..255.
        size: side of the result in pixels.
        fill: RGB colour of the borders, 0..255.

    Source: Karamcheti et al. 2024, Prismatic VLMs, its released `letterbox` strategy.
    """
    num, height, width, _ = images.shape
    side = max(height, width)
    rows, columns = (side - height) // 2, (side - width) // 2
    padded = np.empty((num, height + 2 * rows, width + 2 * columns, 3), np.uint8)
    padded[:] = fill
    padded[:, rows : rows + height, columns : columns + width] = images
    # Borders are equal, so an odd difference leaves one side a pixel short. The release then fits the shorter side
    # and cuts the longer one in the middle.
    height, width = padded.shape[1:3]
    short = min(height, width)
    resized = _bicubic(padded, int(size * height / short), int(size * width / short))
    top, left = (round((length - size) / 2) for length in resized.shape[1:3])
    return resized[:, top : top + size, left : left + size]


def as_in_rlds(images: UInt8[np.ndarray, "N H W 3"], size: int) -> UInt8[np.ndarray, "N S S 3"]:
    """Give frames what those of OpenVLA's training data went through: JPEG, and a Lanczos resize to a square.

    Equal to TensorFlow's `encode_jpeg`, `decode_image` and `resize` (lanczos3, antialias), but for float32 rounding
    where a resized number lies half-way between two.

    Args:
        images: RGB frames, 0..255.
        size: side of the result in pixels.

    Source: Kim et al. 2024, OpenVLA, its released LIBERO evaluation.
    """
    resized = [_lanczos(_jpeg_round_trip(image), size) for image in images]
    return np.stack(resized) if resized else np.empty((0, size, size, 3), np.uint8)


def _jpeg_round_trip(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    import simplejpeg  # only policies that ask for it need it, as below
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling="4:2:0")
    # TensorFlow decodes with the fast transform, which Pillow does not offer: up to 8 levels apart.
    return simplejpeg.decode_jpeg(file.getvalue(), fastdct=True)


def _lanczos(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    from PIL import Image

    channels = [  # in float32: bytes would be rounded between the two directions
        Image.fromarray(channel).resize((size, size), Image.Resampling.LANCZOS)
        for channel in np.moveaxis(image, 2, 0).astype(np.float32)
    ]
    return np.rint(np.stack([np.asarray(channel) for channel in channels], axis=-1)).clip(0, 255).astype(np.uint8)


def center_crop(images: UInt8[np.ndarray, "N H W 3"], area: float = 0.9) -> UInt8[np.ndarray, "N H W 3"]:
    """Cut out the middle and resize it back, for checkpoints that were trained with random crops.

    Equal to TensorFlow's `crop_and_resize` (bilinear, corners on corners) between conversions to float32 and back,
    operation by operation.

    Args:
        images: RGB frames, 0..255.
        area: share of the frame that is kept, in (0, 1]; its sides are the frame's times `sqrt(area)`.

    Source: Kim et al. 2024, OpenVLA, its released LIBERO evaluation.
    """
    unit = images.astype(np.float32) * np.float32(1 / 255)
    left, right, weight = _crop_samples(images.shape[2], area)
    weight = weight[:, None]
    unit = unit[:, :, left] + (unit[:, :, right] - unit[:, :, left]) * weight
    top, bottom, weight = _crop_samples(images.shape[1], area)
    weight = weight[:, None, None]
    unit = unit[:, top] + (unit[:, bottom] - unit[:, top]) * weight
    # 255.5 and truncation: TensorFlow's rounding, under which bytes survive the way to float and back
    return np.minimum(unit.clip(0, 1) * np.float32(255.5), 255).astype(np.uint8)


def _crop_samples(length: int, area: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each of `length` output pixels lies in the input: the pixels around it and the second one's weight."""
    side = np.sqrt(np.float32(area))
    start = (1 - side) / np.float32(2)
    step = (start + side - start) * np.float32(length - 1) / np.float32(max(length - 1, 1))
    place = start * np.float32(length - 1) + np.arange(length, dtype=np.float32) * step
    before = np.floor(place)
    return before.astype(np.int64), np.ceil(place).astype(np.int64), place - before


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
