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
    """Samples `resident_bytes` on a background thread and keeps the largest sum seen.

    Use as a context manager, or `start` and `stop`.
    """

    def __init__(self, interval_s: float = 0.5) -> None:
        """Prepare a sampler.

        Args:
            interval_s: Seconds between samples; one costs a few milliseconds of one core.
        """
        self._interval_s = interval_s
        self._peak = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_rss_bytes(self) -> int:
        """The largest sum seen so far, in bytes."""
        return self._peak

    def sample(self) -> int:
        """Take one sample and return the largest sum so far."""
        self._peak = max(self._peak, resident_bytes())
        return self._peak

    def start(self) -> "PeakMemory":
        """Begin sampling."""
        self.sample()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._loop, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.sample()

    def stop(self) -> int:
        """End sampling and return the peak in bytes."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.sample()

    def __enter__(self) -> "PeakMemory":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
