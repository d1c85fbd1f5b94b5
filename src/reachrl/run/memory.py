"""Peak resident memory of this process and everything it started."""

import threading

import psutil


def resident_bytes() -> int:
    """Return the summed resident set size of this process and all its descendants, in bytes.

    RSS counts a page once for every process that maps it, so frames in shared memory are counted more
    than once: the figure is never too small.
    """
    parent = psutil.Process()
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended between the listing and the look
    return total


class PeakMemory:
    """Samples `resident_bytes` on a background thread while its block runs, and keeps the largest sum seen."""

    def __init__(self, interval_s: float = 0.5) -> None:
        """Prepare a sampler.

        Args:
            interval_s: Seconds between samples; one costs a few milliseconds of one core.
        """
        self._interval_s = interval_s
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="peak-memory", daemon=True)

    @property
    def peak_rss_bytes(self) -> int:
        """The largest sum seen so far, in bytes."""
        return self._peak

    def sample(self) -> int:
        """Take one sample and return the largest sum so far."""
        self._peak = max(self._peak, resident_bytes())
        return self._peak

    def _loop(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.sample()

    def __enter__(self) -> "PeakMemory":
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.sample()
