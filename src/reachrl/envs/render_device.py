"""Selects the device that renders an environment's frames: a GPU, whose EGL and CUDA numbers differ, or the CPU."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from reachrl.envs.gl import gl_back_end
from reachrl.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EglDevice:
    """A device as EGL lists it."""

    index: int  # in EGL's order, which is not CUDA's
    cuda: int | None  # its CUDA number, whatever CUDA_VISIBLE_DEVICES says
    software: bool  # draws on the CPU


def render_variables(choice: str, row: int) -> dict[str, str]:
    """The environment variables with which worker `row` draws where `env.render_device` says.

    Warns, once, when that is a GPU and frames have to be drawn on the CPU instead.

    Args:
        choice: `auto`, `cpu`, `cuda` or `cuda:K`.
        row: number of the worker; `auto` and `cuda` deal the visible GPUs out in turn.
    """
    if os.environ.get("MUJOCO_EGL_DEVICE_ID") or os.environ.get("MUJOCO_GL"):
        return {}  # the user has chosen
    devices = egl_devices()
    index, why_not = choose_device(devices, os.environ.get("CUDA_VISIBLE_DEVICES"), choice, row)
    if why_not and (choice != "auto" or _has_nvidia_gpu()):
        _warn_once(f"frames are drawn on the CPU: {why_not} (env.render_device={choice})")
    if index is not None:
        return {"MUJOCO_EGL_DEVICE_ID": str(index)}
    # Without a software device the choice of the GL library (`reachrl.envs.gl`) decides.
    return next(({"MUJOCO_EGL_DEVICE_ID": str(device.index)} for device in devices if device.software), {})


def check_rendering() -> None:
    """Check that the environment variables that choose the renderer can be honoured here.

    Raises:
        MissingExtra: a library or a display is missing; see `reachrl.envs.gl.gl_back_end`.
        ConfigError: the variables contradict one another, or name a device that EGL does not list.
    """
    back_end = gl_back_end()
    number = os.environ.get("MUJOCO_EGL_DEVICE_ID", "").strip()
    if back_end != "egl" or not number:
        return
    devices = egl_devices()
    if not number.isdecimal() or (devices and int(number) >= len(devices)):
        known = f"a number from 0 to {len(devices) - 1}" if devices else "a number"
        raise ConfigError(
            f"MUJOCO_EGL_DEVICE_ID={number} names no device that EGL lists; expected {known}, or unset it and "
            "env.render_device chooses"
        )


def choose_device(
    devices: Sequence[EglDevice], visible: str | None, choice: str, row: int
) -> tuple[int | None, str | None]:
    """EGL's number of the GPU that draws for worker `row`, or none for the CPU, and what is in the way of a GPU.

    Args:
        devices: what EGL lists.
        visible: `CUDA_VISIBLE_DEVICES`, or none where it is not set.
        choice: see `render_variables`.
        row: number of the worker.
    """
    if choice == "cpu":
        return None, None
    of_cuda = {device.cuda: device.index for device in devices if device.cuda is not None}
    if not of_cuda:
        return None, "EGL lists no NVIDIA device (is the driver's EGL library installed?)"
    if visible is None:
        ordered = sorted(of_cuda)
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if not all(name.isdigit() for name in names):
            return None, f"CUDA_VISIBLE_DEVICES={visible} does not name devices by numbers, as EGL needs them"
        ordered = [int(name) for name in names]
    gpus = [of_cuda.get(number) for number in ordered]
    wanted = int(choice.removeprefix("cuda:")) if ":" in choice else row % len(gpus) if gpus else 0
    if wanted >= len(gpus):
        return None, f"there is no cuda:{wanted} among the {len(gpus)} visible GPUs"
    if gpus[wanted] is None:
        return None, f"EGL does not list CUDA device {ordered[wanted]}"
    return gpus[wanted], None


@cache
def egl_devices() -> tuple[EglDevice, ...]:
    """The EGL devices of this machine; empty without EGL."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("egl_query.py"))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
        listed = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("EGL's devices could not be listed (%s)", error)
        return ()
    return tuple(EglDevice(index=index, **device) for index, device in enumerate(listed))


def _has_nvidia_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
