"""Shared memory between environment workers and their parent."""

import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from reachrl.envs.base import Shown
from reachrl.errors import ExtensionError


class SharedArrays:
    """Layout of the memory map in which `N` workers write their observations.

    Args:
        fd: an open file of at least `size(...)` bytes.
        num_envs: N.
        shown: by each of them.
    """

    def __init__(self, fd: int, num_envs: int, shown: Shown):
        buffer, offset = mmap.mmap(fd, self.size(num_envs, shown)), 0
        arrays: dict[str, np.ndarray] = {}
        for name, shape, kind in _parts(num_envs, shown):
            count = math.prod(shape)
            arrays[name] = np.frombuffer(buffer, kind, count, offset).reshape(shape)
            offset = _aligned(offset + count * kind.itemsize)
        self.images = {camera: arrays[f"image {camera}"] for camera in shown.cameras}
        self.final_images = {camera: arrays[f"final image {camera}"] for camera in shown.cameras}
        self.state, self.final_state = arrays.get("state"), arrays.get("final state")
        self.ee_state, self.progress = arrays["ee_state"], arrays["progress"]
        self.stepping = arrays["stepping"]  # u8[N]: 1 while an environment's own code runs

    @staticmethod
    def size(num_envs: int, shown: Shown) -> int:
        """Bytes needed."""
        return sum(_aligned(math.prod(shape) * kind.itemsize) for _, shape, kind in _parts(num_envs, shown))

    def show(self, row: int, observation: Mapping[str, Any]) -> None:
        """Put what an environment observes into its row.

        Raises:
            ExtensionError: it is not what `observation_space` promises.
        """
        self._put(row, observation, self.images, self.state)

    def show_final(self, row: int, observation: Mapping[str, Any]) -> None:
        """Put what an environment observes at the end of an episode into its row.

        Raises:
            ExtensionError: it is not what `observation_space` promises.
        """
        self._put(row, observation, self.final_images, self.final_state)

    def _put(
        self, row: int, observation: Mapping[str, Any], images: dict[str, np.ndarray], state: np.ndarray | None
    ) -> None:
        places = {("images", camera): place[row] for camera, place in images.items()}
        if state is not None:
            places["state", ""] = state[row]
        for (key, camera), place in places.items():
            found = np.asarray(observation[key][camera] if camera else observation[key])
            if found.shape != place.shape or found.dtype != place.dtype:
                raise ExtensionError(
                    f"environment contract: an observation's {key} {camera} is {found.dtype}{list(found.shape)}, "
                    f"observation_space promises {place.dtype}{list(place.shape)}"
                )
            place[...] = found


def _parts(num_envs: int, shown: Shown) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    """The arrays by name, in their order."""
    pixel, number = np.dtype(np.uint8), np.dtype(np.float32)
    parts = [(f"image {camera}", (num_envs, *shape), pixel) for camera, shape in shown.cameras.items()]
    parts += [(f"final image {camera}", (num_envs, *shape), pixel) for camera, shape in shown.cameras.items()]
    if shown.state_size is not None:
        parts += [(name, (num_envs, shown.state_size), number) for name in ("state", "final state")]
    parts += [("ee_state", (num_envs, 4), number), ("progress", (num_envs, 2), number)]
    return [*parts, ("stepping", (num_envs,), np.dtype(np.uint8))]


def _aligned(offset: int) -> int:
    return (offset + 15) // 16 * 16


def anonymous_file() -> IO[bytes]:
    """An unnamed file, which the system removes however this process ends."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("reachrl"), "r+b")
    return tempfile.TemporaryFile()
