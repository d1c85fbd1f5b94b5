"""Kill a training run at awkward moments; resumed, it must end with the numbers of a run left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forked import Forked, run_reachrl, start_reachrl

pytestmark = pytest.mark.e2e

# Two iterations between checkpoints, so that a kill loses finished iterations that must be run again.
OVERRIDES = [
    "num_iterations=5",
    "checkpoint_every=2",
    "env.num_envs=4",
    "rollout.num_steps=20",
    "demos.episodes_per_task=4",
    "sft.epochs=2",
    "reward_model.steps=10",
    "reward_model.rollouts_per_task=2",
    "reward_model.num_frames=2",
    "reward_model.shuffled_negatives=0.1",
    "reward_model.refit_every=2",
    "reward_model.refit_steps=5",
    "reward_model.refit_window=2",
    "reward.normalise=true",
    "eval.num_starts=2",
    "num_threads=1",
]


def command(stage: str, run: Path) -> list[str]:
    return [*stage.split(), "toy", *OVERRIDES, "--run", str(run)]


def run_to_end(stage: str, run: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    return run_reachrl(*command(stage, run), *changes)


def train_lines(run: Path) -> list[dict]:
    """The training records without what depends on the clock."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    records = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [
        {key: value for key, value in record.items() if not key.startswith("seconds/")}
        for record in records
        if record["kind"] == "train"
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("prepared") / "run"
    for stage in ("demos", "sft", "reward fit"):
        done = run_to_end(stage, run)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(prepared, run)
    done = run_to_end("train", run)
    assert done.returncode == 0, done.stderr
    assert len(train_lines(run)) == 5
    return run


def fresh(stage: str, run: Path) -> subprocess.Popen[str]:
    """Start a stage in an interpreter of its own: what the terminal's Ctrl-C meets, with other orders of sets."""
    arguments = [sys.executable, "-m", "reachrl", *command(stage, run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(
    process: subprocess.Popen[str] | Forked, run: Path, after_lines: int, how: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Wait for some iterations and a moment into the next, and stop the process that trains."""
    deadline = time.monotonic() + 120
    while len(train_lines(run)) < after_lines and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess("train", process.wait(), out, err)


@pytest.mark.parametrize(("after_lines", "how"), [(3, signal.SIGKILL), (1, signal.SIGKILL), (4, signal.SIGINT)])
def test_a_resumed_run_equals_one_left_alone(prepared, uninterrupted, tmp_path, after_lines, how):
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    start = fresh if how == signal.SIGINT else lambda stage, run: start_reachrl(*command(stage, run))
    stopped = interrupt(start("train", run), run, after_lines, how)
    assert stopped.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), stopped.stderr
    if how == signal.SIGINT:
        assert "resume" in stopped.stderr and "Traceback" not in stopped.stderr
    resumed = start("train", run)
    _, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert train_lines(run) == train_lines(uninterrupted)
    ours, theirs = (folder / "policy" / "model.safetensors" for folder in (run, uninterrupted))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_story_ends_with_a_summary_and_a_report(uninterrupted):
    for stage in ("eval", "report"):
        done = run_to_end(stage, uninterrupted)
        assert done.returncode == 0, done.stderr
    summary = json.loads((uninterrupted / "summary.json").read_text())
    for when in ("success_before", "success_after"):
        assert summary[when]["n"] == 6 and summary[when]["wilson95"][0] <= summary[when]["rate"]
        assert set(summary[when]["per_task"]) == {"red-square", "green-square", "blue-square"}
    assert summary["num_env_steps"] == 5 * 20 * 4
    assert {"demos", "sft", "reward", "train", "eval", "total"} <= set(summary["wall_s"])
    assert summary["peak_rss_bytes"] > 100e6 and summary["protocol_hash"] and summary["config_hash"]
    assert {"auc", "rank_correlation"} <= set(summary["reward_model"])
    page = (uninterrupted / "report.html").read_text()
    assert summary["protocol_hash"] in page and "In: What action should the robot take to" in page


def test_another_configuration_is_refused_in_the_same_folder(uninterrupted):
    done = run_to_end("train", uninterrupted, "algorithm.lr=0.5")
    assert done.returncode == 2
    assert "algorithm.lr" in done.stderr and "0.5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", ["truncate", "remove", "architecture"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(prepared, uninterrupted, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    shutil.copytree(uninterrupted / "checkpoints", run / "checkpoints")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    weights = newest / "policy" / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "remove":
        weights.unlink()
    else:
        config = newest / "policy" / "config.json"
        config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    done = run_to_end("train", run)
    assert done.returncode == 6, done.stderr
    assert newest.name in done.stderr and "Traceback" not in done.stderr
    assert newest.exists()


@pytest.mark.parametrize("held", ["plain", "nf4"])
def test_adapters_are_trained_killed_and_resumed_like_whole_weights(prepared, tmp_path, held):
    """On the warm-started policy as a frozen base, with a critic of its own; the base is in no checkpoint."""
    base = prepared / "sft" / "policy"
    lora = [f"policy.checkpoint={base}", "policy.lora.rank=4", "policy.critic=adapter", "num_iterations=3"]
    lora += [
        f"policy.lora.base={held}",
        "policy.gradient_checkpointing=true",
        "policy.rollout_copy=true",
        "checkpoint_every=1",
    ]

    def stage(name: str, run: Path) -> subprocess.CompletedProcess[str]:
        return run_to_end(name, run, *lora)

    whole, run = tmp_path / "whole", tmp_path / "run"
    for name in ("demos", "sft", "reward fit"):
        done = stage(name, whole)
        assert done.returncode == 0, done.stderr
    shutil.copytree(whole, run)
    done = stage("train", whole)
    assert done.returncode == 0, done.stderr
    process = start_reachrl(*command("train", run), *lora)
    while len(train_lines(run)) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = stage("train", run)
    assert done.returncode == 0, done.stderr
    assert train_lines(run) == train_lines(whole) and len(train_lines(run)) == 3
    for name in ("adapter_model.safetensors", "critic/adapter_model.safetensors", "value_head.safetensors"):
        before, ours, theirs = ((folder / name).read_bytes() for folder in (
            run / "sft" / "policy", run / "policy", whole / "policy"
        ))  # fmt: skip
        assert ours == theirs != before, name
    assert not list(run.rglob("model.safetensors")) or all("reward" in str(p) for p in run.rglob("model.safetensors"))


NO_EXPERT = """
from typing import Literal
from reachrl.testing.envs import ReachConfig, ReachEnv

class NoExpertConfig(ReachConfig):
    kind: Literal["no_expert:NoExpert"] = "no_expert:NoExpert"

class NoExpert(ReachEnv):
    Config = NoExpertConfig

    def expert_action(self):
        raise NotImplementedError
"""


def test_a_simulator_without_an_expert_is_trained_from_a_checkpoint(prepared, tmp_path):
    (tmp_path / "no_expert.py").write_text(NO_EXPERT)
    ours = ["env.kind=no_expert:NoExpert", *(each for each in OVERRIDES if not each.startswith("reward"))]
    spared = ["sft.epochs=0", f"policy.checkpoint={prepared / 'sft' / 'policy'}", "reward.kind=task"]

    def stage(name: str, run: Path, *changes: str) -> subprocess.CompletedProcess[str]:
        return run_reachrl(name, "toy", *ours, *changes, "--run", str(run), cwd=tmp_path)

    done = stage("demos", tmp_path / "asked")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no scripted expert" in done.stderr and "policy.checkpoint" in done.stderr
    run = tmp_path / "run"
    done = stage("quickstart", run, *spared, "num_iterations=2")
    assert done.returncode == 0, done.stderr
    assert "nothing to collect" in done.stderr + done.stdout and not (run / "demos").exists()
    assert len(train_lines(run)) == 2 and (run / "report.html").exists()
    assert json.loads((run / "summary.json").read_text())["reward_model"] is None
