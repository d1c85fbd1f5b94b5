"""The preset `toy`, which newcomers meet first, must improve on starts that nothing was trained on, on three seeds.

As newcomers run it, but for the greedy evaluation, which is in `docs/benchmarks/toy.md`.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from tiny_run import play, train_lines

from reachrl.config.loading import load_config

CHANGES = ("eval.temperatures=[1]", "eval.num_videos=0", "num_threads=1")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_toy_learns(seed, tmp_path):
    play(load_config("toy", (*CHANGES, f"seed={seed}")), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after, test = (found[key] for key in ("success_before", "success_after", "paired_test"))
    assert before["n"] == after["n"] == 120 and before["rate"] < 0.5, before  # room
    assert test["improved"] > test["worsened"] and test["p_value"] < 0.01, (before, after, test)
    quality = json.loads((tmp_path / "run" / "reward_model" / "quality.json").read_text())
    assert quality["heldout"]["auc"] > 0.8, quality["heldout"]
    assert not any(line.get("audit/alarm") for line in train_lines(tmp_path / "run"))
