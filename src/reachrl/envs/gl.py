"""The off-screen GL library of this process, chosen before MuJoCo is imported."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from reachrl.errors import ConfigError, MissingExtra

_LIBRARIES = {"egl": ("libEGL.so.1", "libEGL.so"), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}
_WINDOWED = {"linux": ("glfw", "glx"), "darwin": ("glfw", "cgl"), "win32": ("glfw", "wgl")}
GL_VARIABLES = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM")


def gl_back_end() -> str:
    """The GL back end that a process would draw with by its environment variables; changes nothing.

    Returns:
        `egl` or `osmesa`, or what draws in a window if `MUJOCO_GL` says so.

    Raises:
        MissingExtra: no library or no display for it, or `MUJOCO_GL` names no back end.
        ConfigError: `PYOPENGL_PLATFORM` contradicts it.
    """
    wanted, platform = _named("MUJOCO_GL"), _named("PYOPENGL_PLATFORM")
    windowed = _WINDOWED.get(sys.platform, ())
    if wanted not in ("", *_LIBRARIES, *windowed):
        raise MissingExtra(
            f"MUJOCO_GL={wanted} names no GL back end; expected {', '.join((*_LIBRARIES, *windowed))}, or unset it and "
            "the one that is installed is taken"
        )
    if wanted in windowed:
        if sys.platform == "linux" and not (_named("DISPLAY") or _named("WAYLAND_DISPLAY")):
            raise MissingExtra(
                f"MUJOCO_GL={wanted} draws in a window, but there is no display (DISPLAY is unset); unset MUJOCO_GL, "
                "or set it to egl or osmesa, which draw off screen"
            )
        return wanted
    if platform and (platform not in _LIBRARIES or wanted not in ("", platform)):
        drawn = f"MUJOCO_GL={wanted}" if wanted else "frames, which are drawn off screen by egl or osmesa"
        raise ConfigError(f"PYOPENGL_PLATFORM={platform} does not go with {drawn}; unset PYOPENGL_PLATFORM")
    if wanted and "mujoco" in sys.modules:
        return wanted
    asked = wanted or platform
    for name in (asked,) if asked else _LIBRARIES:
        if any(_loads(library) for library in _LIBRARIES[name]):
            return name
    source = f" ({'MUJOCO_GL' if wanted else 'PYOPENGL_PLATFORM'}={asked})" if asked else ""
    raise MissingExtra(
        f"rendering needs an off-screen GL library, but {asked or 'neither egl nor osmesa'} could not be loaded"
        f"{source}; on Debian or Ubuntu run\n  apt-get install libegl1 libgl1-mesa-dri libosmesa6"
    )


def choose_gl() -> str:
    """Pick the off-screen GL back end of this process; call before MuJoCo is imported.

    Returns:
        See `gl_back_end`.

    Raises:
        MissingExtra: see `gl_back_end`.
        ConfigError: see `gl_back_end`.
    """
    for name in GL_VARIABLES:
        if not os.environ.get(name, "x"):
            del os.environ[name]  # empty counts as unset, but not to MuJoCo
    if not os.environ.get("LP_NUM_THREADS"):
        os.environ["LP_NUM_THREADS"] = "0"  # draw in the calling thread: the workers themselves fill the cores
    name = gl_back_end()
    if name in _LIBRARIES:
        os.environ["MUJOCO_GL"] = name
        os.environ.setdefault("PYOPENGL_PLATFORM", name)
    return name


def _named(variable: str) -> str:
    """An environment variable's value in lower case; empty where it is unset."""
    return os.environ.get(variable, "").strip().lower()


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
    imported = "mujoco" in sys.modules
    try:
        import mujoco
    except ImportError as error:
        raise MissingExtra(f"this environment needs MuJoCo ({error}); run  pip install 'reachrl[metaworld]'") from error
    if not imported:
        _keep_no_assets(mujoco)
    return mujoco


def _keep_no_assets(mujoco: Any) -> None:
    """Switch off MuJoCo's cache of compiled meshes and textures: up to 500 MB a process, for scenes compiled once.

    Only while it is empty: shrinking one that holds something ends the process (MuJoCo 3.3.0).
    """
    for path in Path(mujoco.__file__).parent.glob("libmujoco.*"):
        library = ctypes.CDLL(str(path))
        library.mj_globalCache.restype = ctypes.c_void_p
        library.mj_setCacheSize(ctypes.c_void_p(library.mj_globalCache()), ctypes.c_size_t(0))
