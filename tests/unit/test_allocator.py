"""What is left of memory between blocks that live on, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reachrl.policies.storage import weights

PROGRAM = """
import re, sys
import numpy as np
from reachrl.allocator import return_freed_blocks
if sys.argv[1] == "returned":
    return_freed_blocks()
def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
np.ones(2**21)  # 16 MiB, freed at once: glibc takes blocks up to this size from its heap from now on
before = resident()
pairs = [(np.ones(10 * 2**16), np.ones(2**12)) for _ in range(20)]  # 5 MiB and 32 KiB
living = [small for _, small in pairs]
del pairs
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc does")
def test_freed_blocks_between_living_ones_go_back_to_the_system():
    command = [sys.executable, "-c", PROGRAM]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}  # as `make test`
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    left = {name: float(subprocess.run([*command, name], **options).stdout) for name in ("returned", "kept")}
    assert left["returned"] < 6 and left["kept"] > 60, left  # MiB, of which 1 lives on


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_pytorch_asks_for_huge_pages_unless_the_user_said_otherwise(given, found):
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"} | given
    program = "import reachrl, os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == found


@pytest.mark.parametrize("large", [True, False])
def test_large_weights_are_read_into_memory_that_goes_back(large, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(weights, "return_freed_blocks", lambda: said.append(True))
    monkeypatch.setattr(weights, "_LARGE", 100 if large else 10_000)
    save_file({"weight": torch.ones(5, 6)}, tmp_path / weights.SINGLE_FILE)
    module = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        weights.copy_weights(module, tmp_path, lambda name: name)
    assert said == [True] * large and module.weight.eq(1).all()
