"""One configuration and one writer a run folder; stage records survive a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest

from reachrl.config.loading import load_config
from reachrl.errors import ConfigError, StorageError
from reachrl.run import process_identity
from reachrl.run.configuration import Change, config_changes, read_history
from reachrl.run.directory import Run
from reachrl.run.memory import PeakMemory
from reachrl.run.process_identity import ProcessIdentity
from reachrl.run.stages import StageRecords

CONFIG = {"seed": 1, "algorithm": {"lr": 1e-5, "epochs": 2}, "tasks": ["a", "b"]}


def open_run(path: Path, config: dict = CONFIG) -> Run:
    return Run.open(path, config, tensorboard=False)


def test_resume_with_the_same_config_and_refusal_of_another(tmp_path: Path) -> None:
    open_run(tmp_path / "r").close()
    open_run(tmp_path / "r").close()
    assert json.loads((tmp_path / "r" / "config.json").read_text()) == CONFIG
    other = {"seed": 1, "algorithm": {"lr": 3e-6, "epochs": 2, "clip": 0.2}, "tasks": ["a"]}
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path / "r", other)
    message = str(caught.value)
    assert "algorithm.lr: 1e-05 in the run, 3e-06 asked for" in message
    assert "algorithm.clip: absent in the run, 0.2 asked for" in message
    assert 'tasks: ["a", "b"] in the run, ["a"] asked for' in message
    assert "seed" not in message and "epochs" not in message and "--run" in message
    assert (tmp_path / "r" / ".lock").read_text() == ""  # the refusal gave the lock back
    open_run(tmp_path / "r").close()  # and changed nothing


@pytest.mark.parametrize(
    ("facts", "writer"),
    [
        (
            {"packages": {"reachrl": "0.1.0"}, "commit": "0123456789abcdef0123"},
            r"ReachRL 0\.1\.0 \(commit 0123456789ab\)",
        ),
        ({"packages": {"reachrl": "0.1.0"}, "commit": None}, r"ReachRL 0\.1\.0, whose"),
        (None, "an earlier version of ReachRL"),
    ],
)
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"seed": 1, "num_steps": 3, "ppo": {"lr": 1e-5}}, "`ppo`.*`algorithm` and `rollout`"),
        ({"seed": 1, "policy": {"decoder": "own", "vllm": {"python": None}}}, r"`policy\.vllm`.*without vLLM"),
    ],
)
def test_a_run_of_an_earlier_version_is_refused_by_its_version(tmp_path: Path, config, told, facts, writer) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if facts:
        (tmp_path / "provenance.json").write_text(json.dumps(facts))
    for open_old in (lambda: open_run(tmp_path), lambda: load_config(str(tmp_path / "config.json"))):
        with pytest.raises(ConfigError, match=rf"run .* was written by {writer}.*{told}"):
            open_old()


def test_a_file_or_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        open_run(tmp_path / "file")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_run(tmp_path)


def test_changes_are_found_wherever_they_are() -> None:
    assert config_changes(CONFIG, json.loads(json.dumps(CONFIG))) == []
    assert config_changes({"a": {"b": 1}}, {"a": 2}) == [Change("a", {"b": 1}, 2)]


def test_a_permitted_change_is_written_and_recorded(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    assert read_history(tmp_path) == []
    (tmp_path / "checkpoints" / "step_000012").mkdir(parents=True)
    other = {"seed": 1, "algorithm": {"lr": 3e-6, "clip": 0.2}, "tasks": ["a", "b"]}
    judged: list[Change] = []
    for _ in range(2):  # the second time nothing differs any more
        Run.open(tmp_path, other, permit=lambda _, found: judged.extend(found), tensorboard=False).close()
    expected = {"algorithm.clip": [None, 0.2], "algorithm.epochs": [2, None], "algorithm.lr": [1e-5, 3e-6]}
    assert [change.key for change in judged] == list(expected)
    assert json.loads((tmp_path / "config.json").read_text()) == other
    (entry,) = read_history(tmp_path)
    assert entry["changes"] == expected and entry["iteration"] == 12 and entry["when"].endswith("+00:00")


def test_damaged_histories_and_configurations_are_named(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    (tmp_path / "config_history.json").write_text('[{"iteration": 1}]')
    with pytest.raises(StorageError, match=r"config_history\.json is damaged"):
        read_history(tmp_path)
    for damaged in ("{", "[1]", "\xff"):
        (tmp_path / "config.json").write_bytes(damaged.encode("latin-1"))
        with pytest.raises(StorageError, match=r"config\.json .*choose another --run"):
            open_run(tmp_path)


@pytest.mark.parametrize("place", ["/proc/run", "/proc/runs/1", "x" * 300, "file/below"])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        open_run(tmp_path / place)


HOLD = """
import sys, time
from pathlib import Path
from reachrl.run.directory import Run
run = Run.open(Path(sys.argv[1]), {}, tensorboard=False)
print("held", flush=True)
time.sleep(60)
"""


def test_lock_refuses_a_living_owner_and_is_taken_over_from_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "r"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        with pytest.raises(ConfigError, match=rf"process {holder.pid} .*another folder \(--run or --out\)"):
            Run.open(path, {}, tensorboard=False)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        Run.open(path, {}, tensorboard=False).close()
    finally:
        holder.kill()
        holder.wait()


def test_lock_of_a_reused_process_id_is_stale_and_of_another_host_is_not(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    lock = tmp_path / ".lock"
    alive = {"pid": os.getppid(), "started": 1.0, "host": os.uname().nodename, "token": "x"}
    lock.write_text(json.dumps(alive))
    open_run(tmp_path).close()
    lock.write_text(json.dumps({**alive, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match="elsewhere"):
        open_run(tmp_path)
    lock.write_text('{"pid": 12')  # killed while writing it
    open_run(tmp_path).close()


def test_spans_add_up_in_the_next_record_only(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for _ in range(2):
            with run.span("rollout"):
                time.sleep(0.02)
        first = run.log({"kind": "train", "iteration": 1})
        second = run.log({"kind": "train", "iteration": 2})
    assert 0.04 <= first["seconds/rollout"] < 0.5
    assert second == {"kind": "train", "iteration": 2}


def test_stage_seconds_add_up_over_interrupted_attempts(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(KeyboardInterrupt), run.stages.measure("sft"):
            time.sleep(0.05)
            raise KeyboardInterrupt
        interrupted = run.stages.read()["sft"]
        assert run.stages.done("sft") is None
        assert interrupted["wall_s"] >= 0.05
        with run.stages.measure("sft") as clock:
            clock.info["best_step"] = 7
        done = run.stages.done("sft")
        assert done is not None and done["info"] == {"best_step": 7} and done["attempts"] == 2
        assert done["wall_s"] >= interrupted["wall_s"]
        with run.stages.measure("demos"):
            pass
        assert list(run.stages.read()) == ["sft", "demos"]


def test_a_killed_stage_keeps_its_seconds(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
from reachrl.run.stages import StageRecords
with StageRecords(Path(sys.argv[1]), beat_s=0.05).measure("train"):
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "stages.json"
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode == -9
    records = StageRecords(path)
    assert records.done("train") is None
    assert 0.1 <= records.read()["train"]["wall_s"] <= 0.5
    before = records.read()["train"]["wall_s"]
    with records.measure("train"):
        time.sleep(0.1)
    assert records.read()["train"]["wall_s"] >= before + 0.1


def test_peak_memory_sees_a_child(tmp_path: Path) -> None:
    with PeakMemory(interval_s=0.02) as memory:
        before = memory.peak_rss_bytes
        subprocess.run([sys.executable, "-c", "x = bytearray(80_000_000); import time; time.sleep(0.3)"], check=True)
    assert 80_000_000 <= memory.peak_rss_bytes - before < 200_000_000
    held = np.ones(1)  # nothing of the child is left afterwards
    assert PeakMemory().sample() < memory.peak_rss_bytes and held.size == 1


# --- who holds a folder, seen from other containers, boots and machines --------------------------------

IN_A_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def namespaces_allowed() -> bool:
    try:
        return subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not namespaces_allowed(), reason="makes no namespace of process ids (needs root and unshare)")
def test_a_process_of_another_pid_namespace_holds_its_folder_until_it_ends(tmp_path: Path) -> None:
    """Two containers, each with a process 1, over one folder."""
    path = tmp_path / "r"
    hold = [*IN_A_NAMESPACE, sys.executable, "-c", HOLD, str(path)]
    holder = subprocess.Popen(hold, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        assert json.loads((path / ".lock").read_text())["pid"] == 1
        again = subprocess.run(hold, capture_output=True, text=True, timeout=60)  # process 1 of its own namespace
        assert again.returncode == 1 and "process 1 on" in again.stderr and "another container" in again.stderr
        with pytest.raises(ConfigError, match=r"process 1 on .*another container.*delete .*\.lock"):
            open_run(path)
    finally:
        holder.kill()  # and with it, by --kill-child, the namespace
        holder.communicate()
    # On a disk the kernel lock tells that the container is gone.
    if os.major(path.stat().st_dev):
        Run.open(path, {}, tensorboard=False).close()


def taken(tmp_path: Path, **changes: object) -> Path:
    """A lock that names this process, but for `changes`; its kernel lock is not held."""
    open_run(tmp_path).close()
    lock = tmp_path / ".lock"
    record = asdict(ProcessIdentity.own()) | {"token": "x", "held": None} | changes
    lock.write_text(json.dumps(record))
    return lock


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"boot": "another"}, "another container, machine or boot"),
        ({"boot": "another", "host": "elsewhere"}, "on elsewhere"),
        ({"namespace": "pid:[1]"}, "another container"),
        ({"namespace": "pid:[1]", "pid": 1, "held": [0, 0]}, "process 1 on"),
    ],
)
def test_an_owner_that_cannot_be_looked_up_is_taken_for_alive(tmp_path: Path, monkeypatch, changes, words) -> None:
    monkeypatch.setattr(os, "major", lambda _: 0)  # as on a network file system
    lock = taken(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"{words}.*if it is surely gone, delete {lock}"):
        open_run(tmp_path)


def test_an_owner_from_before_a_power_cut_is_dead_where_a_disk_says_so(tmp_path: Path, monkeypatch) -> None:
    taken(tmp_path, boot="another", held=[0, 0])
    monkeypatch.setattr(os, "major", lambda _: 254)
    open_run(tmp_path).close()


@pytest.mark.parametrize("pid", ["12", None, [1], 1.5])
def test_a_lock_that_names_no_process_is_nobodys(tmp_path: Path, pid: object) -> None:
    taken(tmp_path, pid=pid)
    open_run(tmp_path).close()


def test_the_id_of_an_ended_process_may_be_another_ones_now(tmp_path: Path) -> None:
    parent = os.getppid()
    started = process_identity.start_of(parent)
    lock = taken(tmp_path, pid=parent, started=started)
    with pytest.raises(ConfigError, match=f"process {parent} on"):
        open_run(tmp_path)
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"started": started - 1}))
    open_run(tmp_path).close()


def test_a_process_start_is_what_the_kernel_says(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    expected = psutil.Process().create_time() - psutil.boot_time()  # s since boot
    assert process_identity.start_of(os.getpid()) / ticks == pytest.approx(expected, abs=1.5 / ticks)
    ended = subprocess.Popen(["true"])
    while process_identity.start_of(ended.pid) is not None:  # until it is a zombie, which holds nothing
        time.sleep(0.01)
    assert not process_identity.is_running(ended.pid, 1)
    ended.wait()
    assert not process_identity.is_running(ended.pid, 1)
