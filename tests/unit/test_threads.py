"""Waiting OpenMP threads, as the runtime itself says after it was loaded."""

import os
import subprocess
import sys

import pytest

from reachrl.child import Child

pytestmark = pytest.mark.fresh

SHOWN = {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path)}
OURS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}


def spin_count(**variables: str) -> str | None:
    """What libgomp prints about its spinning in a process that imports the package, then PyTorch."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | SHOWN | variables
    done = subprocess.run(
        [sys.executable, "-c", "import reachrl, ctypes, glob, os, importlib.util\n"
         "torch = importlib.util.find_spec('torch').submodule_search_locations[0]\n"
         "for file in glob.glob(os.path.join(torch, 'lib', 'libgomp*')): ctypes.CDLL(file)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    return found[0].partition("'")[2].rstrip("'") if found else None


def test_the_runtime_spins_briefly_unless_the_user_says_otherwise():
    usual = spin_count()
    if usual is None:
        pytest.skip("PyTorch brings no libgomp here")
    assert usual == "2000"
    assert spin_count(GOMP_SPINCOUNT="77") == "77"
    assert spin_count(OMP_WAIT_POLICY="passive") == "0"


def test_children_inherit_it(monkeypatch, tmp_path):
    (tmp_path / "shows_variables.py").write_text(
        "import os\nfrom reachrl.child import pipe_to_parent\n"
        "pipe_to_parent().send([os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME')])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GOMP_SPINCOUNT", "55")
    child = Child("shows_variables", {"KMP_BLOCKTIME": "7"})
    try:
        assert child.pipe.poll(60) and child.pipe.recv() == ["55", "7"]
    finally:
        child.end()
