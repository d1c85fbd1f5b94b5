"""Waiting threads of OpenMP, which sleep soon instead of spinning."""

import os

# Set before the first OpenMP runtime is loaded. By default a waiting thread of GNU's runtime spins some milliseconds,
# which on a machine with other programs takes the core from the thread it waits for: several times slower, and far
# more beside many programs. After this many rounds, some hundred microseconds, it sleeps; docs/benchmarks/busy.md.
SPIN_COUNT = "2000"  # libgomp: Linux builds of PyTorch
BLOCK_TIME_MS = "1"  # Intel's and LLVM's runtimes: macOS, conda, MKL


def bound_spinning() -> None:
    """Let waiting OpenMP threads of this process and its children sleep soon, unless the user said otherwise."""
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        os.environ.setdefault("KMP_BLOCKTIME", BLOCK_TIME_MS)
