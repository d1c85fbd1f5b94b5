"""Releases memory that MuJoCo keeps after a scene is compiled and rendered."""

import ctypes
import mmap
import sys
from typing import Any

from reachrl.envs.gl import import_mujoco


def release_compilation() -> None:
    """Free the source of the last scene that MuJoCo read, which it keeps: hundreds of megabytes with LIBERO."""
    import_mujoco().MjModel.from_xml_string("<mujoco/>")  # takes its place
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def release_textures(model: Any) -> None:
    """Free the textures' pixels, which a GL context has copied: no other context can be made of `model` afterwards."""
    if sys.platform != "linux" or not model.ntexdata:
        return
    begin = model.tex_data.ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (begin + model.tex_data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
