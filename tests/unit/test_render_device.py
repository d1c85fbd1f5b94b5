"""Which device draws: EGL's numbers found from CUDA's, without a GPU in sight."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from toy_policy import toy_config

from reachrl import child
from reachrl.config.env import MetaworldConfig
from reachrl.envs import gl, render, render_device
from reachrl.envs.egl_query import query
from reachrl.envs.render_device import EglDevice, check_rendering, choose_device, render_variables
from reachrl.envs.vector import VectorEnv
from reachrl.errors import ConfigError, MissingExtra
from reachrl.testing.envs import ReachEnv
from reachrl.types import Start

pytestmark = pytest.mark.fresh

SOFTWARE = EglDevice(index=3, cuda=None, software=True)
# EGL's order is not CUDA's: its devices 0, 1, 2 are CUDA's 2, 0, 1.
THREE_GPUS = (*(EglDevice(index=i, cuda=c, software=False) for i, c in enumerate((2, 0, 1))), SOFTWARE)


@pytest.fixture
def machine(monkeypatch):
    """Fakes what EGL lists, the environment and whether the kernel knows a GPU."""
    for name in (*gl.GL_VARIABLES, "CUDA_VISIBLE_DEVICES", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")  # so that what a test sets goes again
        monkeypatch.delenv(name)
    monkeypatch.setattr(gl, "_loads", lambda library: library.startswith("libEGL"))
    render_device._warn_once.cache_clear()

    def fake(devices, *, gpu=False, **environment):
        monkeypatch.setattr(render_device, "egl_devices", lambda: tuple(devices))
        monkeypatch.setattr(render_device, "_has_nvidia_gpu", lambda: gpu)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return fake


@pytest.mark.parametrize(
    ("visible", "choice", "devices"),
    [
        (None, "cuda", [1, 2, 0, 1]),  # CUDA 0, 1, 2, 0
        (None, "auto", [1, 2, 0, 1]),
        (None, "cuda:2", [0, 0, 0, 0]),
        ("2,0", "cuda", [0, 1, 0, 1]),
        ("2,0", "cuda:1", [1, 1, 1, 1]),
        ("1", "auto", [2, 2, 2, 2]),
        (None, "cpu", [3, 3, 3, 3]),
    ],
)
def test_workers_draw_on_the_gpus_that_cuda_means(machine, caplog, visible, choice, devices):
    machine(THREE_GPUS, gpu=True, **({"CUDA_VISIBLE_DEVICES": visible} if visible else {}))
    assert [int(render_variables(choice, row)["MUJOCO_EGL_DEVICE_ID"]) for row in range(4)] == devices
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("visible", "choice", "why"),
    [
        (None, "cuda:3", "there is no cuda:3 among the 3 visible GPUs"),
        ("2", "cuda:1", "there is no cuda:1 among the 1 visible GPUs"),
        ("5", "cuda", "EGL does not list CUDA device 5"),
        ("", "cuda", "among the 0 visible GPUs"),
        ("GPU-8f6d", "cuda", "does not name devices by numbers"),
    ],
)
def test_without_the_gpu_the_cpu_draws_and_says_why_once(machine, caplog, visible, choice, why):
    machine(THREE_GPUS, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert [render_variables(choice, row) for row in range(2)] == [{"MUJOCO_EGL_DEVICE_ID": "3"}] * 2
    [record] = caplog.records
    assert record.levelname == "WARNING" and "drawn on the CPU" in record.message and why in record.message


def test_a_gpu_that_egl_does_not_see_is_told_and_no_gpu_is_no_news(machine, caplog):
    machine([SOFTWARE])
    assert render_variables("auto", 0) == {"MUJOCO_EGL_DEVICE_ID": "3"} and caplog.text == ""
    machine([SOFTWARE], gpu=True)
    assert render_variables("auto", 0) == {"MUJOCO_EGL_DEVICE_ID": "3"}
    assert "EGL lists no NVIDIA device" in caplog.text


def test_the_users_own_choice_stands(machine):
    machine(THREE_GPUS, MUJOCO_EGL_DEVICE_ID="1")
    assert render_variables("cuda:0", 0) == {}
    assert choose_device((), None, "cpu", 0) == (None, None)


@pytest.mark.parametrize("empty", ["MUJOCO_EGL_DEVICE_ID", "MUJOCO_GL"])
def test_an_empty_variable_counts_as_unset(machine, monkeypatch, empty):
    machine(THREE_GPUS, **{empty: ""})
    assert render_variables("cuda:0", 0) == {"MUJOCO_EGL_DEVICE_ID": "1"}
    check_rendering()
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    gl.choose_gl()
    assert empty not in os.environ or os.environ[empty]  # MuJoCo itself would choke on it


@pytest.mark.parametrize(
    ("variables", "error", "words"),
    [
        ({"MUJOCO_EGL_DEVICE_ID": "5"}, ConfigError, "MUJOCO_EGL_DEVICE_ID=5 .*a number from 0 to 3, or unset it"),
        ({"MUJOCO_EGL_DEVICE_ID": "abc"}, ConfigError, "MUJOCO_EGL_DEVICE_ID=abc .*a number from 0 to 3"),
        ({"MUJOCO_EGL_DEVICE_ID": "-1"}, ConfigError, "MUJOCO_EGL_DEVICE_ID=-1 "),
        ({"MUJOCO_GL": "glfw"}, MissingExtra, "MUJOCO_GL=glfw draws in a window, but there is no display"),
        ({"MUJOCO_GL": "glx", "DISPLAY": ""}, MissingExtra, "MUJOCO_GL=glx .*no display"),
        ({"MUJOCO_GL": "wgl"}, MissingExtra, "MUJOCO_GL=wgl names no GL back end; expected egl, osmesa, glfw, glx"),
        ({"PYOPENGL_PLATFORM": "osmesa"}, MissingExtra, r"osmesa could not be loaded \(PYOPENGL_PLATFORM=osmesa\)"),
        ({"PYOPENGL_PLATFORM": "osmesa", "MUJOCO_GL": "egl"}, ConfigError, "does not go with MUJOCO_GL=egl; unset"),
        ({"PYOPENGL_PLATFORM": "x11"}, ConfigError, "PYOPENGL_PLATFORM=x11 does not go with frames.*off screen"),
    ],
    ids=str,
)
@pytest.mark.skipif(sys.platform != "linux", reason="back ends of Linux")
def test_variables_that_cannot_be_followed_are_told_before_any_worker_starts(
    machine, monkeypatch, variables, error, words
):
    machine(THREE_GPUS, **variables)
    monkeypatch.setattr(child, "subprocess", None)  # no process can be started
    with pytest.raises(error, match=words) as caught:
        VectorEnv(MetaworldConfig(tasks=("door-close",)), 2)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({}, "egl"),
        ({"PYOPENGL_PLATFORM": "egl"}, "egl"),
        ({"MUJOCO_EGL_DEVICE_ID": "3"}, "egl"),
        ({"MUJOCO_GL": "glfw", "DISPLAY": ":0", "MUJOCO_EGL_DEVICE_ID": "9"}, "glfw"),
    ],
    ids=str,
)
def test_variables_that_can_be_followed_are(machine, variables, chosen):
    machine(THREE_GPUS, **variables)
    check_rendering()
    assert gl.gl_back_end() == chosen


def test_a_context_that_cannot_be_made_is_told_with_the_variables(machine, monkeypatch):
    machine(THREE_GPUS, MUJOCO_EGL_DEVICE_ID="2")

    def refuse(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(render, "import_mujoco", lambda: SimpleNamespace(GLContext=refuse))
    with pytest.raises(MissingExtra, match="MUJOCO_EGL_DEVICE_ID=2.*no such device"):
        render.Renderer(8)


def test_this_machines_devices_are_listed_whatever_cuda_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    render_device.egl_devices.cache_clear()
    assert [(d.cuda, d.software) for d in render_device.egl_devices()] == [(d["cuda"], d["software"]) for d in query()]


def test_each_worker_process_is_told_its_device(machine, monkeypatch):
    machine(THREE_GPUS)
    started = []
    popen = child.subprocess.Popen

    def spy(*arguments, env, **options):
        started.append(env.get("MUJOCO_EGL_DEVICE_ID"))
        return popen(*arguments, env=env, **options)

    monkeypatch.setattr(child, "subprocess", SimpleNamespace(**vars(child.subprocess) | {"Popen": spy}))
    monkeypatch.setattr(ReachEnv, "shares_process", False)
    config = toy_config("env.render_device=cuda")
    with VectorEnv(config.env, 3) as envs:
        starts = [Start(envs.tasks[0], "train", n) for n in range(3)]
        assert envs.reset(starts, starts).frames.dtype == np.uint8
    assert started == ["1", "2", "0"]
