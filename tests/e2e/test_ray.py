"""Training by many processes on Ray, some of which are killed: the numbers of one process left alone."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from forked import Forked, start_reachrl

pytest.importorskip("ray")

OPTIONS = ["toy", "num_iterations=6", "checkpoint_every=2", "env.num_envs=4", "num_threads=1"]
OPTIONS += ["eval.during_every=3", "eval.during_starts=4"]
OPTIONS += [
    "rollout.num_steps=30",
    "demos.episodes_per_task=8",
    "sft.epochs=3",
    "reward_model.steps=30",
    "reward_model.rollouts_per_task=2",
    "algorithm.lr=2e-4",
]  # seconds; small steps, whose rounding stays small
RAY = ["backend.kind=ray", "backend.actors=2", "backend.learners=2", "backend.deadline_s=90"]


def start(*arguments: str) -> Forked:
    return start_reachrl(*arguments, together=True, family=True)


def finish(process: Forked) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def records(folder: Path, kind: str = "train") -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in found if record["kind"] == kind]


def wait_for(folder: Path, iterations: int) -> None:
    deadline = time.monotonic() + 150
    while len(records(folder)) < iterations and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(records(folder)) >= iterations


def workers(process: Forked, kind: str) -> list[psutil.Process]:
    """The Ray actors of one kind that this command has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(f"ray::{kind}"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "warm"
    for stage in (["demos"], ["sft"], ["reward", "fit"]):
        finish(start(*stage, *OPTIONS, "--run", str(folder)))
    return folder


@pytest.fixture(scope="module")
def alone(warm) -> Path:
    folder = warm.parent / "alone"
    shutil.copytree(warm, folder)
    finish(start("train", *OPTIONS, "--run", str(folder)))
    return folder


def assert_same_run(folder: Path, expected: Path) -> None:
    for one, other in zip(records(expected), records(folder), strict=True):
        for name in one.keys() & other.keys():
            if name != "kind" and not name.startswith("seconds/"):
                wanted = one[name] if one[name] is None else pytest.approx(one[name], rel=2e-3, abs=2e-5)
                assert other[name] == wanted, (one["iteration"], name)
    assert [record["iteration"] for record in records(expected, "validation")] == [0, 3, 6]  # and the last
    assert records(folder, "validation") == records(expected, "validation")
    weights, found = (load_file(run / "policy" / "model.safetensors") for run in (expected, folder))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(found[name].numpy(), weight.numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_many_processes_train_as_one_does_even_if_an_actor_is_killed(warm, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(warm, folder)
    more = ["backend.sharding=full", "backend.env_groups=2", "backend.reward_workers=1"]
    process = start("train", *OPTIONS, *RAY, *more, "--run", str(folder))
    wait_for(folder, 1)
    os.kill(workers(process, "ActorProcess")[0].pid, signal.SIGKILL)
    said = finish(process)
    assert "another process takes its place" in said and "actor" in said
    assert_same_run(folder, alone)
    timeline = json.loads((folder / "timeline.json").read_text())
    names = {span["who"] for span in timeline["spans"]}
    assert names == {"loop", "actor 0", "actor 1", "learner", "reward worker 0"}
    assert [entry["rows"] for entry in timeline["balance"]] in ([2, 2], [3, 1], [1, 3])
    assert all(record["weight_sync/gap"] < 1e-4 for record in records(folder))


def test_a_run_outlives_a_learner_and_then_its_own_process(warm, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(warm, folder)
    process = start("train", *OPTIONS, *RAY, "backend.placement=colocated", "--run", str(folder))
    wait_for(folder, 1)
    os.kill(workers(process, "LearnerProcess")[-1].pid, signal.SIGKILL)
    wait_for(folder, 3)  # new learners went on
    # Ray's own agents take two minutes to notice.
    titles = [(each, " ".join(each.cmdline())) for each in psutil.Process(process.pid).children(recursive=True)]
    ours = [each for each, title in titles if "Agent" not in title]
    process.kill()
    said, _ = process.communicate(timeout=60)
    assert "going on from it with new processes" in said
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert not alive  # nobody is left behind
    finish(start("train", *OPTIONS, "--run", str(folder)))  # without Ray
    assert_same_run(folder, alone)


def test_bad_layouts_are_refused_before_anything_starts(warm, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(warm, folder)
    for changes, words in (
        (["backend.kind=ray", "backend.actors=9"], "need 9 environments, but env.num_envs=4"),
        (["backend.kind=ray", "backend.address=127.0.0.1:1"], "no Ray cluster answers there, or"),
        (["backend.kind=ray", "backend.actors=2", "backend.placement=colocated"], "set them equal"),
        (["backend.env_groups=5"], "backend.env_groups=5 groups need as many"),
        (["collect_ahead=true"], "set algorithm.importance_cap"),
    ):
        process = start("train", *OPTIONS, *changes, "--run", str(folder))
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 2 and words in said and "Traceback" not in said, said
