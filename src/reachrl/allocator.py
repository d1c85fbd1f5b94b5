"""Memory of tensors on a CPU: what PyTorch asks of glibc's allocator, and what that keeps when tensors were freed."""

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_BLOCK = 4 * 2**20  # bytes


def use_huge_pages() -> None:
    """Let PyTorch ask for pages of 2 MiB for tensors of that size, unless the user said otherwise.

    Set before the first tensor is made. Nothing is changed for smaller tensors, nor where the system has no such pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_blocks() -> None:
    """Give blocks of 4 MiB and more back to the system as soon as they are freed; nothing where there is no glibc.

    By default glibc raises that size to 32 MiB as blocks are freed, and places activations and gradients of large
    models in one heap: gaps between what lives on are kept. Measured on OpenVLA-7B: up to 3 GB during an update. New
    pages are the price: 2 to 10 % of the processor time of an update (docs/benchmarks/full_size.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_M_MMAP_THRESHOLD, _BLOCK)
