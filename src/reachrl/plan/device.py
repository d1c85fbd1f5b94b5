"""Devices: memory, peak arithmetic and bandwidth, and the fraction of the peak that is reached."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from reachrl.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or the CPUs of this machine.

    Arithmetic and bandwidth are the vendor's peak; the shares are the fractions of it that a pass is expected to reach.
    """

    name: str
    memory: float  # GiB available to programs
    bf16: float  # dense TFLOP/s
    fp32: float  # TFLOP/s
    bandwidth: float  # GB/s
    capability: tuple[int, int] | None = None  # CUDA's compute capability; a CPU has none
    forward_share: float = 0.75
    training_share: float = 0.75
    bandwidth_share: float = 0.72
    launch_s: float = 5e-6  # minimum time to launch one operation, s

    @property
    def is_cpu(self) -> bool:
        """Whether learner and simulators share its memory."""
        return self.name == "cpu"


# Arithmetic, bandwidth and capability are those of NVIDIA's data sheets, without sparsity; memory is what PyTorch says
# is the total capacity in its out-of-memory messages. fp32 is plain, as PyTorch multiplies unless told to use TF32.
#
# The shares (fields above) go back to an H200: large bf16 products reach 790 of 989 TFLOP/s and copies 4.3 of 4.8 TB/s
# there; of that, 65 % in a forward pass, 45 % in training and 80 % of the bandwidth are good. 0.65 * 790 / 989 = 0.52,
# 0.45 * 790 / 989 = 0.36, 0.80 * 4.3 / 4.8 = 0.72. The time to start an operation is an estimate for eager PyTorch.
DEVICES = {
    device.name: device
    for device in (
        Device(name="h200", memory=139, bf16=989, fp32=67, bandwidth=4800, capability=(9, 0)),
        Device(name="h100", memory=79, bf16=989, fp32=67, bandwidth=3350, capability=(9, 0)),  # SXM, 80 GB
        Device(name="a100-80", memory=79, bf16=312, fp32=19.5, bandwidth=2039, capability=(8, 0)),
        Device(name="a100-40", memory=39, bf16=312, fp32=19.5, bandwidth=1555, capability=(8, 0)),
        Device(name="l40s", memory=44, bf16=362, fp32=91.6, bandwidth=864, capability=(8, 9)),
        Device(name="4090", memory=23.5, bf16=165, fp32=82.6, bandwidth=1008, capability=(8, 9)),
    )
}


def find_device(name: str, memory: float | None = None) -> Device:
    """Return the device called `name`; `cpu` is measured in under half a second.

    Args:
        name: `cpu` or a name of `DEVICES`.
        memory: replaces the device's memory, in GiB.

    Raises:
        ConfigError: no such device, or no such amount of memory.
    """
    known = ["cpu", *DEVICES]
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"unknown device {name!r}{hint}. Known devices: {', '.join(known)}.")
    device = measure_cpu() if name == "cpu" else DEVICES[name]
    if memory is None:
        return device
    if not 0 < memory < math.inf:  # nor is it NaN
        raise ConfigError(f"--memory {memory:g}: expected the memory to plan for in GiB, a finite number above 0.")
    return replace(device, memory=memory)


def measure_cpu() -> Device:
    """Measure this machine: PyTorch's products in either type, copies in NumPy, and the free memory."""
    import numpy as np
    import psutil
    import torch

    def tflops(dtype: torch.dtype) -> float:
        size = 640  # short runs: one of them is undisturbed
        matrix = torch.ones(size, size, dtype=dtype)
        product = torch.empty_like(matrix)
        return 2e-12 * size**3 / _shortest(lambda: torch.mm(matrix, matrix, out=product))

    source = np.ones(2**23, np.float32)
    target = np.zeros_like(source)  # written once, so that its pages are mapped
    bandwidth = 2e-9 * source.nbytes / _shortest(lambda: np.copyto(target, source))  # read and written
    return Device(
        name="cpu",
        memory=psutil.virtual_memory().available / GIB,
        bf16=tflops(torch.bfloat16),
        fp32=tflops(torch.float32),
        bandwidth=bandwidth,
        forward_share=0.6,
        training_share=0.6,
        bandwidth_share=0.5,
        launch_s=3e-6,
    )


def _shortest(run: Callable[[], object], budget_s: float = 0.15) -> float:
    """Return the seconds of the fastest run within a time budget: other processes disturb the rest."""
    end, best = time.perf_counter() + budget_s, float("inf")
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
