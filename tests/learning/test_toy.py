"""The preset `toy`, which newcomers meet first, must improve on starts that nothing was trained on.

Shortened for CI to a third of its iterations, the task's own reward, greedy actions and fewer starts, on one seed; all
of it on three seeds is in `docs/benchmarks/toy.md`.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from tiny_run import play

from reachrl.config.loading import load_config

CHANGES = (
    "num_iterations=8",
    "reward.kind=task",
    "eval.temperatures=[0]",
    "eval.num_starts=15",
    "eval.num_videos=0",
    "num_threads=1",
)


def test_the_toy_learns(tmp_path):
    play(load_config("toy", CHANGES), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after, test = (found[key] for key in ("success_before", "success_after", "paired_test"))
    assert before["n"] == after["n"] == 45 and before["rate"] < 0.5, before  # room
    assert test["improved"] > test["worsened"] and test["p_value"] < 0.01, (before, after, test)
