"""What is asked of upstream's modules and classes once they are imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CAMERA = "agentview"  # the fixed one, which publications use


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator while the block runs, then restore its state."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def problem_of(envs: Any, path: str) -> tuple[str, type]:
    """Name and class of upstream's that the task file at `path` asks for."""
    name = envs.env_wrapper.BDDLUtils.get_problem_info(path)["problem_name"]
    return name, envs.TASK_MAPPING[name]


def regions_of(definition: Path) -> dict[str, Any]:
    """The regions of a task file, as upstream reads them."""
    from libero.libero.envs import bddl_utils  # pyright: ignore[reportMissingImports]

    return bddl_utils.robosuite_parse_problem(str(definition))["regions"]


def extended(base: type, ours: type, **values: Any) -> type:
    """Upstream's class with `ours` put in front of it, and class attributes for ours."""
    return type(base.__name__, (ours, base), values)  # the name stays: upstream compares it with the one in the file
