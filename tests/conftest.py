"""Shared set-up of all tests: shape checking, one thread each, markers by folder, reasons for skips."""

import gc
import os
import signal
import subprocess

# What is imported stays: going through it again and again took a tenth of the suite's processor time.
gc.disable()

# Before numpy or torch are imported: the suite runs in parallel processes, and results must not depend
# on the number of cores. Worker processes inherit it.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# A shell that starts the suite in the background makes it deaf to Ctrl-C, and with it every process that
# the tests start in order to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Every public function and record of these is checked against its annotated shapes and dtypes.
# The hook works on imports, so it comes before the first `import reachrl` of any test.
SHAPE_CHECKED = ("reachrl.types", "reachrl.functional", "reachrl.policies")
_hook = install_import_hook(SHAPE_CHECKED, "beartype.beartype")
_hook.__enter__()

# The same examples in every run: a red CI can be repeated at home.
hypothesis.settings.register_profile("reachrl", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("reachrl")

# After the hook: what is imported here is checked too.
from forked import FORKS, children_are_forked, forker
from reachrl import child

MARKED_FOLDERS = ("sim", "gpu", "e2e", "learning")


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that share the tests share the process that forks, too, which imports while they collect."""
    if config.getoption("numprocesses", None):
        os.environ[FORKS] = forker().folder


def pytest_collection_finish() -> None:
    """Collect garbage from here on, none of it among what was imported."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test the marker of its folder."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what this machine cannot run; decide how processes of environments begin."""
    # Long trainings check no shapes: it takes a third of their time, and shorter tests call the same functions.
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("learning") is not None)
    fresh = item.get_closest_marker("fresh") or item.get_closest_marker("sim")
    child.subprocess = subprocess if fresh else children_are_forked()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
