"""`torchrun ... reachrl train`: one run by several processes, which may die."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from forked import Forked, forker, ranks, start_reachrl

CHANGES = ["toy", "num_iterations=5", "checkpoint_every=1", "env.num_envs=3", "num_threads=1"]
CHANGES += [
    "rollout.num_steps=30",
    "demos.episodes_per_task=8",
    "sft.epochs=3",
    "reward_model.steps=30",
    "reward_model.rollouts_per_task=2",
    "algorithm.lr=2e-4",
]  # seconds; small steps
# Without the dashes torchrun takes --run for one of its own options.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "reachrl"]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def forked_torchrun(*arguments: str) -> Forked:
    return forker().start("torch.distributed.run", *TORCHRUN[2:], *arguments, together=True, family=True)


def ended(process: subprocess.Popen[str] | Forked) -> str:
    """What a command said until it ended well."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def alone(*arguments: str) -> str:
    """Run a command in one process."""
    return ended(start_reachrl(*arguments, together=True))


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A run whose training may begin."""
    folder = tmp_path_factory.mktemp("torchrun") / "warm"
    for stage in (["demos"], ["sft"], ["reward", "fit"]):
        alone(*stage, *CHANGES, "--run", str(folder))
    return folder


def test_two_processes_train_as_one_does(warm, tmp_path):
    single, shared = tmp_path / "single", tmp_path / "shared"
    for folder in (single, shared):
        shutil.copytree(warm, folder)
    alone("train", *CHANGES, "--run", str(single))
    said = ended(torchrun("train", *CHANGES, "--run", str(shared)))
    assert said.count("train: finished") == 1  # the follower is quiet
    first, again = records(single)[0], records(shared)[0]
    for name in first:
        if name != "kind" and not name.startswith("seconds/"):
            expected = first[name] if first[name] is None else pytest.approx(first[name], rel=1e-4, abs=1e-6)
            assert again[name] == expected, name
    assert len(records(shared)) == 5
    assert (shared / "policy" / "model.safetensors").is_file()
    # Finished: everyone leaves at once.
    finished = [start_reachrl("train", *CHANGES, "--run", str(shared), together=True, **rank) for rank in ranks(2)]
    assert "already done" in "".join(map(ended, finished))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_ends_the_run_and_one_process_resumes_it(warm, tmp_path, rank):
    folder = tmp_path / "run"
    shutil.copytree(warm, folder)
    launcher = forked_torchrun("train", *CHANGES, "--run", str(folder))
    deadline = time.monotonic() + 120
    while len(records(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    victims = [child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == rank]
    assert len(victims) == 1
    os.kill(victims[0].pid, signal.SIGKILL)
    launcher.communicate(timeout=90)
    assert launcher.returncode != 0
    assert 2 <= len(records(folder)) < 5
    alone("train", *CHANGES, "--run", str(folder))
    assert [record["iteration"] for record in records(folder)] == list(range(5))


def test_torchrun_is_for_training_only(warm):
    process = start_reachrl("sft", *CHANGES, "--run", str(warm), together=True, **ranks(2)[1])
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "torchrun is for `reachrl train`" in said
