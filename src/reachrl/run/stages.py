"""Records of a run's stages: finished or not, wall time, peak memory."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reachrl.errors import StorageError
from reachrl.run.atomic import write_json_atomic
from reachrl.run.memory import PeakMemory
from reachrl.run.records import Stages, read_record


class StageClock:
    """What a running stage may add to its record."""

    def __init__(self) -> None:
        """Start with nothing to add."""
        self.info: dict[str, Any] = {}


class StageRecords:
    """The file `stages.json`: `{name: {done, wall_s, peak_rss_bytes, attempts, info}}`.

    `wall_s` sums over attempts: while a stage runs, its seconds so far are written every few seconds, so
    that a kill loses no more than those.
    """

    def __init__(self, path: Path, beat_s: float = 10.0) -> None:
        """Name the file and the seconds between two writes of a running stage."""
        self.path = Path(path)
        self._beat_s = beat_s
        self._writing = threading.Lock()

    def read(self) -> dict[str, dict[str, Any]]:
        """Return every record, in the order the stages first ran."""
        if not self.path.exists():
            return {}
        return read_record(self.path, Stages, remedy="delete it and the stages resume from their own files")

    def done(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished stage, or None."""
        record = self.read().get(name)
        return record if record and record["done"] else None

    def reopen(self, names: Iterable[str]) -> None:
        """Mark finished stages as unfinished; their seconds so far are kept."""
        records = self.read()
        for name in set(names) & records.keys():
            records[name] = {**records[name], "done": False}
        with self._writing:
            write_json_atomic(self.path, records)

    def _previous(self, name: str) -> dict[str, Any]:
        """What earlier, interrupted attempts left; nothing if the stage is new or starts over after finishing."""
        record = self.read().get(name)
        return record if record and not record["done"] else {"wall_s": 0.0, "peak_rss_bytes": 0, "attempts": 0}

    def _write(
        self, name: str, previous: dict[str, Any], wall_s: float, peak: int, *, done: bool, info: dict[str, Any]
    ) -> None:
        record = {
            "done": done,
            "wall_s": round(previous["wall_s"] + wall_s, 3),
            "peak_rss_bytes": max(previous["peak_rss_bytes"], peak),
            "attempts": previous["attempts"] + 1,
            "info": info,
        }
        with self._writing:
            write_json_atomic(self.path, {**self.read(), name: record})

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[StageClock]:
        """Time a block and its memory; finished if it ends without an error, interrupted otherwise.

        Args:
            name: The stage.

        Yields:
            A clock whose `info` dict goes into the record.
        """
        previous, clock, start = self._previous(name), StageClock(), time.monotonic()
        stop = threading.Event()
        memory = PeakMemory()

        def beat() -> None:
            while not stop.wait(self._beat_s):
                try:
                    self._write(name, previous, time.monotonic() - start, memory.peak_rss_bytes, done=False, info={})
                except StorageError:
                    return  # a full disk is reported where data is written, not from this thread

        thread = threading.Thread(target=beat, name=f"stage-{name}", daemon=True)
        done = False
        with memory:
            thread.start()
            try:
                yield clock
                done = True
            finally:
                stop.set()
                thread.join()
                peak = memory.sample()
                with contextlib.nullcontext() if done else contextlib.suppress(StorageError):
                    # Where the block failed because the disk is full, its own error is the one to show.
                    self._write(name, previous, time.monotonic() - start, peak, done=done, info=clock.info)
