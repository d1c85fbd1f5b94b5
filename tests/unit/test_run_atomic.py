"""Writes that are killed or refused leave what was there before."""

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from reachrl.errors import StorageError
from reachrl.run.atomic import (
    aside,
    jsonable,
    recover_tree,
    replace_folder_atomic,
    write_bytes_atomic,
    write_json_atomic,
)
from reachrl.run.process_identity import ProcessIdentity, start_of


def run_python(code: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60)


def test_json_round_trip_of_numpy_and_undefined_numbers(tmp_path: Path) -> None:
    write_json_atomic(
        tmp_path / "a" / "x.json", {"a": np.float32(0.5), "b": np.arange(3), "c": math.nan, "d": tmp_path}
    )
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": None,
        "d": str(tmp_path),
    }
    assert jsonable([np.inf, np.array([1.0, np.nan])]) == [None, [1.0, None]]
    with pytest.raises(TypeError, match="object"):
        jsonable({"a": object()})


def test_full_disk_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    write_bytes_atomic(path, b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"x\.bin.*No space left.*intact"):
        write_bytes_atomic(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_a_real_refusal_of_the_kernel_inside_safetensors_is_a_storage_error(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel itself refuse; the Rust library reports it as its own exception class."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from reachrl.errors import StorageError
from reachrl.run.checkpoint import save_checkpoint, latest_checkpoint, verify_checkpoint
folder = Path(sys.argv[1])
save_checkpoint(folder, 1, lambda p: save_file({"w": np.ones(10)}, p / "w.safetensors"))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint(folder, 2, lambda p: save_file({"w": np.ones(100_000)}, p / "w.safetensors"))
except StorageError as error:
    assert "step_000002" in str(error), error
    assert [p.name for p in folder.iterdir()] == ["step_000001"]
    verify_checkpoint(latest_checkpoint(folder))
    print("refused")
"""
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "refused", done.stdout + done.stderr


def test_a_bug_in_fill_keeps_its_own_error_and_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    replace_folder_atomic(target, lambda p: (p / "w").write_text("1"))  # type: ignore[func-returns-value]

    def buggy(folder: Path) -> None:
        (folder / "w").write_text("2")
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        replace_folder_atomic(target, buggy)
    assert (target / "w").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


KILL = """
import os, pathlib, signal, sys
from pathlib import Path
from reachrl.run import atomic
target, moment = Path(sys.argv[1]), sys.argv[2]
real = pathlib.Path.rename
seen = 0
def rename(self, other):
    global seen
    seen += 1
    if seen == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, other)
pathlib.Path.rename = rename
atomic.replace_folder_atomic(target, lambda p: (p / "w").write_text("new"))
"""


@pytest.mark.parametrize("moment", [1, 2])
def test_kill_around_the_rename_leaves_the_old_folder(tmp_path: Path, moment: int) -> None:
    """Moment 1: everything written, nothing renamed. Moment 2: the old folder already set aside."""
    target = tmp_path / "policy"
    target.mkdir()
    (target / "w").write_text("old")
    assert run_python(KILL, target, moment).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # there is something to clean
    recover_tree(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert (target / "w").read_text() == "old"
    assert run_python(KILL, target, 99).returncode == 0
    assert (target / "w").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_leftovers_of_a_living_process_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"x.json.tmp-{os.getppid()}"
    other.write_text("half")
    write_json_atomic(tmp_path / "x.json", 1)
    assert other.exists()


def test_copies_of_other_places_wait_an_hour_and_folders_set_aside_go_back_at_once(tmp_path: Path) -> None:
    """A container that was killed leaves both; its successor has the same process ids."""
    own = aside(tmp_path / "policy").name.rpartition("-")[0]
    elsewhere = own.replace(own.split("-")[1], "00000000")
    for number, age_s in enumerate((10, 7200)):
        copy = tmp_path / f"x.json{elsewhere.removeprefix('policy')}-{number:08x}"
        copy.write_text("half")
        os.utime(copy, (time.time() - age_s,) * 2)
    (tmp_path / f"policy{elsewhere.removeprefix('policy').replace('tmp', 'old')}-00000000").mkdir()
    recover_tree(tmp_path)
    assert sorted(path.name[-8:] for path in tmp_path.iterdir()) == ["00000000", "policy"]


def test_a_reused_process_id_does_not_keep_a_leftover(tmp_path: Path) -> None:
    parent, place = os.getppid(), ProcessIdentity.own().place
    started = start_of(parent)
    for number, start in enumerate((started, started - 1)):
        (tmp_path / f"x.json.tmp-{place}-{parent}-{start}-{number:08x}").write_text("half")
    write_json_atomic(tmp_path / "x.json", 1)
    assert [path.name[-8:] for path in sorted(tmp_path.iterdir())] == ["x.json", "00000000"]


def test_two_threads_write_one_file_under_names_of_their_own(tmp_path: Path) -> None:
    assert len({aside(tmp_path / "x").name for _ in range(100)}) == 100


def test_text_that_is_no_utf8_is_written_as_an_escape_and_read_back(tmp_path: Path) -> None:
    command = ["--run", os.fsdecode(b"r\xe9sultats"), "\u2028"]
    write_json_atomic(tmp_path / "x.json", command)
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8", "strict")) == command
