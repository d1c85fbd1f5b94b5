"""The examples run as they are, in seconds: one after another on the tiny run that the first of them trains."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_run import OVERRIDES

from reachrl.functional.stats import wilson

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples' `runs/` lie; the first example has been run there."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "first.txt").write_text(run_example(folder, "train_on_tasks", *OVERRIDES))
    return folder


def run_example(folder: Path, name: str, *arguments: str) -> str:
    """Run a script as `python examples/NAME.py ...` does, in this process; returns what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with open(folder / f"{name}.out", "w+") as out:
            patch.setattr(sys, "stdout", out)
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            out.seek(0)
            return out.read()


def test_each_example_is_run_here():
    text = Path(__file__).read_text()
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'"{path.stem}"' not in text] == []


def test_train_on_tasks(folder):
    after = json.loads((folder / "runs/tasks/eval/after.json").read_text())
    printed = (folder / "first.txt").read_text()
    assert set(after["sampled"]["per_task"]) == {"red-square", "blue-square"}
    k = after["greedy"]["k"]
    low, high = (100 * bound for bound in wilson(k, 2))
    assert re.search(rf"^greedy: .* before, {k}/2 = .* % \[{low:.1f}, {high:.1f}\] after$", printed, re.MULTILINE)
    assert "\x1b" not in printed  # no terminal: plain lines
    assert (folder / "runs/tasks/report.html").is_file()


def test_act(folder):
    printed = run_example(folder, "act")
    assert re.fullmatch(r"red-square: (success|failure) after [1-4] decisions\n", printed)


def test_compare_policies(folder):
    printed = run_example(folder, "compare_policies", "eval.num_starts=1")
    stored = {
        when: json.loads((folder / f"runs/tasks/eval/{when}.json").read_text())["greedy"]["k"]
        for when in ("before", "after")
    }
    assert f"before: {stored['before']}/2 = " in printed and f"after:  {stored['after']}/2 = " in printed
    assert "McNemar p = " in printed


def test_plot_metrics(folder):
    pytest.importorskip("matplotlib")
    assert run_example(folder, "plot_metrics") == "3 iterations in runs/tasks/learning_curve.png\n"
    assert (folder / "runs/tasks/learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_own_environment(folder):
    """A class of the script itself reaches the processes of experts and environments, which cannot import it."""
    changes = ("env.max_steps=12", "demos.episodes_per_task=1", "demos.workers=1", "sft.epochs=1", "num_iterations=1")
    printed = run_example(folder, "own_environment", *OVERRIDES, *changes)
    assert re.search(r"^before \d/2 = .*, after \d/2 = ", printed, re.MULTILINE)
    assert json.loads((folder / "runs/slider/config.json").read_text())["env"]["kind"] == "__main__:Slider"


def test_own_reward(folder):
    overrides = [each for each in OVERRIDES if each != "reward.kind=task"]
    printed = run_example(folder, "own_reward", *overrides, "reward.cost=0.25", "num_iterations=1")
    [record] = [
        record
        for record in map(json.loads, (folder / "runs/time_cost/metrics.jsonl").read_text().splitlines())
        if record["kind"] == "train"
    ]
    assert record["reward/time"] == -0.25  # of every decision
    assert "iteration 0: task" in printed
