"""Environment options are refused with a hint, without a simulator; a missing GL library is named."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from reachrl.config.env import EVAL_POOL, MetaworldConfig
from reachrl.config.metaworld_tasks import INSTRUCTIONS
from reachrl.envs import gl
from reachrl.errors import ConfigError, MissingExtra


def test_each_of_the_50_tasks_has_its_own_sentence():
    assert len(INSTRUCTIONS) == 50
    assert len(set(INSTRUCTIONS.values())) == 50


@pytest.mark.parametrize(
    ("task", "hint"),
    [("drawer-opne", "'drawer-open'"), ("window-open-v3", "'window-open'"), ("xyzzy", "reachrl list")],
)
def test_an_unknown_task_is_named_with_close_matches(task: str, hint: str):
    with pytest.raises(ConfigError, match=f"no task '{task}'.*{hint}"):
        MetaworldConfig(tasks=("drawer-open", task))


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'reach' more than once"):
        MetaworldConfig(tasks=("reach", "reach"))
    for wrong in ({"tasks": ()}, {"action_repeat": 0}, {"num_eval_starts": EVAL_POOL + 1}, {"mesh_face": 3}):
        with pytest.raises(ValidationError):
            MetaworldConfig.model_validate(wrong)


def test_checking_a_configuration_imports_no_simulator():
    code = (
        "import sys; from reachrl.registry import section_class\n"
        "section_class('envs', 'metaworld')(tasks=('reach',))\n"
        "print(sorted({'torch', 'mujoco', 'metaworld', 'gymnasium'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("installed", "wanted", "chosen"),
    [
        (("libEGL", "libOSMesa"), None, "egl"),
        (("libOSMesa",), None, "osmesa"),
        (("libEGL", "libOSMesa"), "osmesa", "osmesa"),
    ],
)
def test_the_gl_back_end_is_what_is_installed_or_wanted(
    installed: tuple[str, ...], wanted: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gl, "_loads", lambda library: library.startswith(installed))
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setenv("MUJOCO_GL", wanted) if wanted else monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert gl.choose_gl() == chosen
    assert gl.os.environ["MUJOCO_GL"] == chosen


@pytest.mark.parametrize("wanted", [None, "egl"])
def test_a_missing_gl_library_names_the_packages(wanted: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gl, "_loads", lambda library: wanted is not None and library.startswith("libOSMesa"))
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setenv("MUJOCO_GL", wanted) if wanted else monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(MissingExtra, match="(?s)apt-get install libegl1 libgl1-mesa-dri libosmesa6"):
        gl.choose_gl()


def test_a_back_end_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "bogus")
    with pytest.raises(MissingExtra, match="MUJOCO_GL=bogus.*egl, osmesa"):
        gl.choose_gl()
