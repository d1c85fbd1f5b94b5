"""Sentences of demonstration files of all 130 tasks against upstream's own, which its evaluation shows."""

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest

from reachrl.config.libero_tasks import SUITES
from reachrl.demos.readers import read_trajectories

_SPEC = find_spec("libero")
if _SPEC is None or not _SPEC.submodule_search_locations:
    pytest.skip("LIBERO is not installed: docs/reference/libero.md", allow_module_level=True)
UPSTREAM = Path(_SPEC.submodule_search_locations[0]) / "libero"


def upstream_sentence():
    """The function by which upstream names its tasks; its module imports a simulator and asks questions."""
    module = ast.parse((UPSTREAM / "benchmark/__init__.py").read_text())
    found = next(node for node in module.body if getattr(node, "name", "") == "grab_language_from_filename")
    scope: dict = {}
    exec(compile(ast.Module([found], []), "benchmark", "exec"), scope)
    return scope["grab_language_from_filename"]


def test_every_task_is_read_with_the_sentence_of_the_evaluation(tmp_path):
    sentence_of = upstream_sentence()
    other_words = 0
    for suite, tasks in SUITES.items():
        for task in tasks:
            bddl = (UPSTREAM / "bddl_files" / suite / f"{task}.bddl").read_text()
            stored = re.findall(r"\(:language\s+([^)]*)\)", bddl)[0].strip()
            path = tmp_path / f"{task}_demo.hdf5"
            with h5py.File(path, "w") as file:
                data = file.create_group("data")
                data.attrs["problem_info"] = json.dumps({"language_instruction": stored})
                data.attrs["macros_image_convention"] = "opengl"
                for name, value in {
                    "actions": np.zeros((2, 7)),
                    "obs/agentview_rgb": np.zeros((2, 8, 8, 3), np.uint8),
                    "obs/ee_pos": np.zeros((2, 3)),
                    "obs/gripper_states": np.zeros((2, 2)),
                }.items():
                    data[f"demo_0/{name}"] = value
            (read,) = read_trajectories(path)
            assert (read.start.task, read.instruction) == (task, sentence_of(f"{task}.bddl"))
            other_words += stored.lower() != read.instruction
    assert other_words == 29
