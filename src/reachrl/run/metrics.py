"""The append-only `metrics.jsonl` (the truth) and TensorBoard, a sink that can be redrawn from it."""

import importlib.util
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reachrl.errors import MissingExtra, StorageError
from reachrl.run.atomic import jsonable, recover, storage_errors, utf8, write_bytes_atomic


def _encode(record: dict[str, Any]) -> bytes:
    return utf8(json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n")


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a metrics file; a last line cut short by a kill is no record.

    Args:
        path: A `metrics.jsonl`; one that does not exist has no records.
        kind: Only records of this kind ("train", "eval", "sft", ...), or all.

    Returns:
        The records in the order they were written.

    Raises:
        StorageError: A line that is not the last is not JSON.
    """
    return [record for record, _ in _read_lines(path) if kind is None or record.get("kind") == kind]


def records_by_kind(path: Path) -> defaultdict[str, list[dict[str, Any]]]:
    """Read a metrics file once for several kinds of records; see `read_metrics`.

    Returns:
        The records of each kind, [] for a kind that the file does not have.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_metrics(path):
        found[record["kind"]].append(record)
    return found


def _read_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Each record with its line; see `read_metrics`."""
    if not Path(path).is_file():
        return []
    *lines, _torn = Path(path).read_bytes().split(b"\n")  # a whole line ends in a newline
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            _check(record)
        except (ValueError, RecursionError) as error:
            raise StorageError(
                f"{path} line {number} is damaged ({error}); the file was altered by something else than a kill. "
                "Remove that line to read the rest."
            ) from error
        records.append((record, line))
    return records


_COUNTS = {"iteration", "step", "k", "n", "success_k", "success_n"}
_NUMBERS = {
    *("train_loss", "heldout_loss", "env_steps", "entropy", "kl", "approx_kl", "clip_frac", "grad_norm"),
    *("explained_variance", "engine_kl", "episode_length", "malformed_rate"),
}
_WEIGHED = ("success_uniform", "success_uniform_weight", "success_uniform_n")


def _check(record: Any) -> None:
    """Check the types of a record's values: readers compare and add them.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("it is no record with a `kind`")
    for key, value in record.items():
        if key in _COUNTS and not _is_number(value):
            raise ValueError(f"{key} is {value!r}, expected a number")
        if (key in _NUMBERS or "/" in key) and not (value is None or _is_number(value)):
            raise ValueError(f"{key} is {value!r}, expected a number or null")
    if record["kind"] == "train" and "iteration" not in record:
        raise ValueError("it has no iteration")
    if ("success_k" in record) != ("success_n" in record):
        raise ValueError("success_k and success_n go together")
    for k, n in (("k", "n"), ("success_k", "success_n")):
        if k in record and n in record and not 0 <= record[k] <= record[n]:
            raise ValueError(f"{k} of {n} is {record[k]} of {record[n]}")
    weighed: list[Any] = [record.get(key) for key in _WEIGHED]
    numbers: list[float] = [value for value in weighed if _is_number(value)]
    if weighed != [None] * 3 and (len(numbers) < 3 or min(numbers[1:]) <= 0):
        raise ValueError(f"{', '.join(_WEIGHED)} are {weighed}, expected a rate and two numbers above 0, or nulls")


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value - value == 0


class MetricsLog:
    """Appends records to `metrics.jsonl`, each on the disk before `log` returns.

    NaN and infinities are written as null: JSON has no word for them, and a reader must be able to tell
    "undefined" (explained variance of a constant) from a number.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        """Open a metrics file for appending, dropping a last line that a kill cut short.

        Args:
            path: The `metrics.jsonl`; created if absent.
            tensorboard: Folder of the TensorBoard sink, or None for no sink.
        """
        self.path = Path(path)
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recover(self.path)
            self._file = self._open()
        self._board = TensorBoardSink(tensorboard) if tensorboard is not None else None

    def _open(self) -> Any:
        file = open(self.path, "ab", buffering=0)
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        return file

    def log(self, record: dict[str, Any]) -> None:
        """Append one record.

        Args:
            record: Flat numbers plus `kind` and the step it belongs to (`iteration` or `step`).

        Raises:
            StorageError: The disk refused the write; the file ends with the record before.
        """
        if "kind" not in record:
            raise ValueError(f"a metrics record needs a kind, got the keys {sorted(record)}")
        line = _encode(record)
        end = os.fstat(self._file.fileno()).st_size
        with storage_errors(self.path):
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)  # no half line stays behind
                raise
        if self._board is not None:
            with storage_errors(self._board.folder):
                self._board.write(record)

    def read(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the records of one kind, or all; see `read_metrics`."""
        return read_metrics(self.path, kind)

    def truncate_after(self, kinds: str | tuple[str, ...], key: str, value: float) -> int:
        """Drop the records of some kinds whose `key` is greater than `value`, as a resume from a checkpoint needs.

        Args:
            kinds: Which records; others stay.
            key: The counter that orders them, such as "iteration".
            value: The last counter that stays.

        Returns:
            How many records were dropped.
        """
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        records = _read_lines(self.path)
        kept = [each for each in records if each[0]["kind"] not in kinds or each[0].get(key, value) <= value]
        dropped = len(records) - len(kept)
        if dropped:
            self._file.close()
            try:
                write_bytes_atomic(self.path, b"".join(line + b"\n" for _, line in kept))
            finally:
                self._file = self._open()
            if self._board is not None:
                for kind in kinds:
                    self._board.truncate_after(kind, value, [record for record, _ in kept if record["kind"] == kind])
        return dropped

    def close(self) -> None:
        """Close the file and the sink."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def flatten_scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, number) for every finite number of a record; `{"k": 3, "n": 4}` becomes the rate 0.75."""
    prefix = f"{record['mode']}/" if isinstance(record.get("mode"), str) else ""

    def walk(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict) and value.get("n") and "k" in value:
            yield name, value["k"] / value["n"]
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{name}/{key}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)

    for key, value in jsonable(record).items():
        if key not in ("kind", "iteration", "step", "mode"):
            yield from walk(prefix + key, value)


class TensorBoardSink:
    """Writes records as TensorBoard scalars, one sub-folder a kind, with the record's own step.

    Written here rather than by TensorBoard's `EventFileWriter`: Ctrl-C that reaches the thread-safe queue of that one
    leaves its lock held, and closing it then waits for ever.
    """

    def __init__(self, folder: Path) -> None:
        """Remember where to write; files appear with the first record of a kind.

        Raises:
            MissingExtra: TensorBoard is not installed.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtra(
                "TensorBoard output is on, but the package `tensorboard` is not installed: "
                "pip install tensorboard, or turn it off (metrics.jsonl holds the same numbers)"
            )
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}

    def _append(self, kind: str, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._files[kind]).write(event.SerializeToString())

    def _open(self, kind: str) -> None:
        """Begin an event file with the name and the first record that TensorBoard looks for."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        now = time.time()
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{now:.6f}.{platform.node()}.{os.getpid()}"
        self._files[kind] = open(folder / name, "wb", buffering=0)
        self._append(kind, Event(wall_time=now, file_version="brain.Event:2"))

    def write(self, record: dict[str, Any]) -> None:
        """Write one record's numbers."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        kind = record["kind"]
        if kind not in self._files:
            self._open(kind)
        step = int(record.get("iteration", record.get("step", 0)))
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in flatten_scalars(record)]
        self._append(kind, Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def truncate_after(self, kind: str, step: float, records: Iterable[dict[str, Any]]) -> None:
        """Drop the kind's events of later steps; where it has no event files, draw `records`, which stay."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        if kind in self._files:
            self._files.pop(kind).close()
        files = sorted((self.folder / kind).glob("*tfevents*"))
        for file in files:
            # Copied with the checksums they have, which Python computes slowly.
            kept = [frame for frame, event in _frames(file.read_bytes()) if Event.FromString(event).step <= step]
            write_bytes_atomic(file, b"".join(kept))
        for record in records if not files else ():
            self.write(record)

    def close(self) -> None:
        """Close every event file."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _frames(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each whole frame of an event file and the event in it: length, checksum of it, event, checksum of the event."""
    begin = 0
    while begin + 16 <= len(content):
        length = int.from_bytes(content[begin : begin + 8], "little")
        end = begin + 16 + length
        if end > len(content):
            return  # cut short by a kill
        yield content[begin:end], content[begin + 12 : end - 4]
        begin = end
