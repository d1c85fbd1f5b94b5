"""The run folder: its paths, its lock, its stage records and the log the loop writes to."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from reachrl.errors import ConfigError
from reachrl.run.atomic import jsonable, recover_tree, storage_errors, write_json_atomic
from reachrl.run.configuration import IsDefault, Permit, claim, never, refuse
from reachrl.run.lock import RunLock
from reachrl.run.metrics import MetricsLog
from reachrl.run.spans import Span, SpanLog
from reachrl.run.stages import StageRecords


class Run:
    """One run on disk, opened for writing by this process alone; open it with `Run.open`."""

    def __init__(self, path: Path, lock: RunLock, *, tensorboard: bool) -> None:
        """Wrap a folder whose lock is held; use `Run.open`."""
        self.path = path
        # Folders are created when something is written into them.
        self.demos = path / "demos"
        self.sft = path / "sft"  # warm start: state, checkpoints and its policy
        self.reward_model = path / "reward_model"
        self.checkpoints = path / "checkpoints"  # of training, `step_NNNNNN`
        self.policy = path / "policy"  # the final one
        self.eval = path / "eval"  # `before.json` and `after.json`
        self.videos = path / "videos"  # `before_<task>.mp4` and `after_<task>.mp4`
        self.conversation = path / "conversation.json"  # one episode turn by turn
        self.provenance = path / "provenance.json"  # commit, versions, hardware, seed and command
        self.summary = path / "summary.json"
        self._lock = lock
        self._seconds: dict[str, float] = {}
        self.spans = SpanLog("loop")
        self.stages = StageRecords(path / "stages.json")
        self.metrics = MetricsLog(path / "metrics.jsonl", path / "tensorboard" if tensorboard else None)

    @classmethod
    def open(
        cls,
        path: Path | str,
        config: dict[str, Any],
        *,
        permit: Permit = refuse,
        is_default: IsDefault = never,
        tensorboard: bool = True,
    ) -> Self:
        """Create a run folder, or open the one that is there to resume it.

        Args:
            path: The run folder.
            config: The resolved configuration, as JSON types.
            permit: Judges changes of an existing run's configuration; those it lets pass are recorded.
            is_default: Whether `config` has the default at a dotted key; what an existing run's configuration lacks is
                then no change.
            tensorboard: Whether the metrics also go to TensorBoard.

        Returns:
            The run, locked.

        Raises:
            ConfigError: The configuration differs where it may not, or the folder is in use, or is not a run.
            StorageError: The folder cannot be written.
        """
        path = Path(path)
        with storage_errors(path):
            if path.exists() and not path.is_dir():
                raise ConfigError(f"--run {path} is a file; expected a folder, or a name that does not exist yet")
            if path.is_dir() and not (path / "config.json").exists() and (path / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{path} has a metrics.jsonl but no config.json, so it cannot be resumed; choose another --run"
                )
            path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path / ".lock")
        lock.acquire()
        try:
            with storage_errors(path):
                recover_tree(path)
            claim(path, jsonable(config), permit, is_default)
            return cls(path, lock, tensorboard=tensorboard)
        except BaseException:
            lock.release()
            raise

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a piece of work; the next `log` carries the sum as `seconds/<name>`.

        Args:
            name: A word such as "rollout".
        """
        start = time.perf_counter()
        try:
            with self.spans.span(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def forget_spans(self) -> None:
        """Discard the spans noted so far: they belong to a failed attempt."""
        self._seconds.clear()
        self.spans.take()

    def write_timeline(self, iteration: int, spans: list[Span], balance: list[dict[str, Any]]) -> None:
        """Write `timeline.json`: the spans of one iteration, in seconds since it began.

        Args:
            iteration: its number.
            spans: of all processes; the loop's own define when the iteration began.
            balance: distribution of the environments over the actors.
        """
        began = min((span.start for span in spans if span.who == self.spans.who), default=0.0)
        rows = [
            {"who": s.who, "what": s.what, "start": round(s.start - began, 6), "end": round(s.end - began, 6)}
            for s in spans
        ]
        record = {"iteration": iteration, "spans": rows, "balance": balance}
        write_json_atomic(self.path / "timeline.json", record)

    def log(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append a metrics record, with the seconds of the spans since the last one.

        Args:
            record: Numbers plus `kind` and `iteration` or `step`.

        Returns:
            The record as written: null for what is not finite.
        """
        spans = {f"seconds/{name}": round(seconds, 4) for name, seconds in self._seconds.items()}
        full = jsonable({**record, **spans})
        self.metrics.log(full)
        self._seconds.clear()
        return full

    def close(self) -> None:
        """Close the metrics file and release the lock."""
        self.metrics.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
