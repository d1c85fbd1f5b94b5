"""metrics.jsonl survives kills, and resume drops what lies behind the checkpoint."""

import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from reachrl.errors import StorageError
from reachrl.run.metrics import MetricsLog, TensorBoardSink, flatten_scalars, read_metrics


def test_a_torn_last_line_is_no_record_and_the_next_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "iteration": 1}\n{"kind": "train", "iterat')
    assert [r["iteration"] for r in read_metrics(path)] == [1]
    log = MetricsLog(path)
    log.log({"kind": "train", "iteration": 2, "loss": math.inf})
    log.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "iteration": 1},
        {"kind": "train", "iteration": 2, "loss": None},
    ]


def test_every_cut_of_a_file_reads_as_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    records = [{"kind": "train", "iteration": i, "x": "é\n" * i} for i in range(3)]
    for record in records:
        log.log(record)
    log.close()
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert read_metrics(path) == records[: content[:cut].count(b"\n")]


def test_a_broken_line_in_the_middle_is_an_error_naming_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "a"}\nrubbish\n{"kind": "a"}\n')
    with pytest.raises(StorageError, match="line 2"):
        read_metrics(path)


def test_truncate_after_drops_only_later_records_of_the_kind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in (100, 200):
        log.log({"kind": "sft", "step": step})
    for i in range(1, 6):
        log.log({"kind": "train", "iteration": i})
        log.log({"kind": "eval", "iteration": i})
    assert log.truncate_after("train", "iteration", 3) == 2
    log.log({"kind": "train", "iteration": 4, "again": True})
    log.close()
    assert [(r["kind"], r.get("iteration", r.get("step"))) for r in log.read()] == [
        ("sft", 100), ("sft", 200),
        ("train", 1), ("eval", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3), ("eval", 4), ("eval", 5),
        ("train", 4),
    ]  # fmt: skip
    assert [r["iteration"] for r in log.read("train")] == [1, 2, 3, 4]


def test_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log({"kind": "train", "iteration": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"m\.jsonl"):
            log.log({"kind": "train", "iteration": 2})
    assert (tmp_path / "m.jsonl").read_text() == '{"kind": "train", "iteration": 1}\n'
    log.log({"kind": "train", "iteration": 2})
    assert len(log.read()) == 2


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_holds_what_the_file_holds_also_after_a_resume(tmp_path: Path) -> None:
    for resumed in (False, True):
        log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb")
        if resumed:
            log.truncate_after("train", "iteration", 2)
        for i in range(3 if resumed else 0, 5):
            log.log({"kind": "train", "iteration": i, "loss/policy": i / 4, "bad": math.nan})
        log.log({"kind": "eval", "iteration": 5, "mode": "greedy", "per_task": {"reach-v3": {"k": 3, "n": 4}}})
        log.close()
    assert tensorboard_scalars(tmp_path / "tb" / "train") == {"loss/policy": [(i, i / 4) for i in range(5)]}
    assert tensorboard_scalars(tmp_path / "tb" / "eval")["greedy/per_task/reach-v3"][0] == (5, 0.75)


@pytest.mark.parametrize("harm", ["cut short", "removed"])
def test_tensorboard_is_right_after_a_resume_whatever_became_of_its_file(tmp_path: Path, harm: str) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb")
    for i in range(5):
        log.log({"kind": "train", "iteration": i, "loss/policy": i / 4})
    log.close()
    [file] = (tmp_path / "tb" / "train").iterdir()
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb")
    log.truncate_after(("train", "validation"), "iteration", 2)
    log.log({"kind": "train", "iteration": 3, "loss/policy": 7.0})
    log.close()
    expected = [(0, 0.0), (1, 0.25), (2, 0.5), (3, 7.0)]
    assert tensorboard_scalars(tmp_path / "tb" / "train") == {"loss/policy": expected}


def interrupted_after(instructions: int, call: Callable[[], object]) -> bool:
    """Call, with Ctrl-C after so many instructions of Python code; False if the call was over before."""
    left = instructions

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if not left:
            raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_at_any_moment_of_writing_leaves_a_sink_that_closes(tmp_path: Path) -> None:
    record = {"kind": "train", "iteration": 1, "loss": 0.5}
    TensorBoardSink(tmp_path / "first").write(record)  # whatever is imported, is
    instructions, interrupted = 0, True
    while interrupted:
        instructions += 3
        sink = TensorBoardSink(tmp_path / str(instructions))
        sink.write(record)
        interrupted = interrupted_after(instructions, lambda sink=sink: sink.write(record))
        closing = threading.Thread(target=sink.close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive(), f"it hangs when interrupted after {instructions} instructions"
    assert instructions > 150
    assert tensorboard_scalars(tmp_path / str(instructions) / "train") == {"loss": [(1, 0.5), (1, 0.5)]}


def test_flatten_skips_words_and_flags() -> None:
    record = {"kind": "eval", "iteration": 3, "mode": "greedy", "k": 1, "rate": 0.5, "note": "x", "wilson95": [0, 1]}
    assert dict(flatten_scalars(record)) == {"greedy/k": 1.0, "greedy/rate": 0.5}
