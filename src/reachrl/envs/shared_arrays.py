"""The memory that environment workers and their parent share."""

import mmap

import numpy as np


class SharedArrays:
    """The memory map's layout: what `N` workers show the parent.

    Args:
        fd: an open file of at least `size(...)` bytes.
        num_envs: N.
        image_size: H = W.
    """

    def __init__(self, fd: int, num_envs: int, image_size: int):
        buffer = mmap.mmap(fd, self.size(num_envs, image_size))
        frames = num_envs * image_size * image_size * 3
        shape = (num_envs, image_size, image_size, 3)
        self.images = np.frombuffer(buffer, np.uint8, frames).reshape(shape)
        self.final_images = np.frombuffer(buffer, np.uint8, frames, frames).reshape(shape)
        numbers = np.frombuffer(buffer, np.float32, num_envs * 6, _aligned(2 * frames))
        self.ee_state = numbers[: num_envs * 4].reshape(num_envs, 4)
        self.progress = numbers[num_envs * 4 :].reshape(num_envs, 2)

    @staticmethod
    def size(num_envs: int, image_size: int) -> int:
        """Bytes needed."""
        return _aligned(2 * num_envs * image_size * image_size * 3) + num_envs * 6 * 4


def _aligned(offset: int) -> int:
    return (offset + 15) // 16 * 16
