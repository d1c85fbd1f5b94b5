"""The off-screen GL library of this process, chosen before MuJoCo is imported."""

import ctypes
import os
import sys
from typing import Any

from reachrl.errors import MissingExtra

_BACK_ENDS = ("", "egl", "osmesa", "glfw", "glx", "cgl", "wgl")  # what MuJoCo can draw with
_LIBRARIES = {"egl": ("libEGL.so.1", "libEGL.so"), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}


def choose_gl() -> str:
    """Pick the off-screen GL back end of this process; call before MuJoCo is imported.

    Returns:
        `egl` or `osmesa` (or what the user put in `MUJOCO_GL`).

    Raises:
        MissingExtra: neither library is installed.
    """
    # Draw in the calling thread: the workers themselves fill the cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted not in _BACK_ENDS:
        raise MissingExtra(
            f"MUJOCO_GL={wanted} names no GL back end; expected {', '.join(filter(None, _BACK_ENDS))}, or unset it and "
            "the one that is installed is taken"
        )
    if wanted not in ("", "egl", "osmesa") or (wanted and "mujoco" in sys.modules):
        return wanted
    for name in (wanted,) if wanted else ("egl", "osmesa"):
        if any(_loads(library) for library in _LIBRARIES[name]):
            os.environ["MUJOCO_GL"] = name
            os.environ.setdefault("PYOPENGL_PLATFORM", name)
            return name
    raise MissingExtra(
        f"rendering needs an off-screen GL library, but {wanted or 'neither egl nor osmesa'} could not be loaded"
        f"{' (MUJOCO_GL=' + wanted + ')' if wanted else ''}; on Debian or Ubuntu run\n"
        "  apt-get install libegl1 libgl1-mesa-dri libosmesa6"
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def import_mujoco() -> Any:
    """The `mujoco` module, with a GL back end chosen first.

    Raises:
        MissingExtra: MuJoCo or a GL library is not installed.
    """
    choose_gl()
    try:
        import mujoco
    except ImportError as error:
        raise MissingExtra(f"this environment needs MuJoCo ({error}); run  pip install 'reachrl[metaworld]'") from error
    return mujoco
