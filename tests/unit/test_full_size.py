"""The story of the full-size benchmark in a small size: official shards, one iteration, saved, restored, exported."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import full_size
from reachrl.policies.openvla.export import export_merged


@pytest.mark.parametrize(("family", "base"), [("openvla", "plain"), ("openvla", "nf4"), ("openvla_oft", "nf4")])
def test_random_weights_are_read_trained_restored_and_exported(family: str, base: str, tmp_path: Path) -> None:
    own = tmp_path / base
    own.mkdir()
    arguments = argparse.Namespace(folder=tmp_path, own=own, size="tiny", base=base, frames="noise", steps=2)
    arguments.family = family
    watch = full_size.Watch(least_gib=0)
    written = full_size.write(arguments, watch)
    index = json.loads((tmp_path / "official" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == pytest.approx(1e9 * written["GB"])
    full_size.frames(arguments, watch)
    assert full_size.train(arguments, watch)["grad_norm"] > 0
    restored = full_size.resume(arguments, watch)
    assert restored["largest difference of log-probs"] == 0 and restored["optimiser steps restored"] == 1
    merge = export_merged(own / "saved" / "policy", own / "merged")
    assert (merge.trained is None) == (base == "plain")
    apart = full_size.reload(arguments, watch)["mean difference of log-probs"]
    assert apart < (0.05 if base == "plain" else 1.0)  # bfloat16, or what rounding to 4 bits does
