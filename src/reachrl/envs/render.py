"""Fast off-screen frames.

Software rendering costs per triangle, hardly per pixel: shadows and reflections are off, and the scenes that come
here have been made small (`reachrl.envs.scene`).
"""

import os
from collections.abc import Collection
from typing import Any

import numpy as np

from reachrl.envs.gl import GL_VARIABLES, import_mujoco
from reachrl.errors import MissingExtra


class Renderer:
    """The one off-screen GL context of this process, shared by the scenes it draws in turn."""

    def __init__(self, size: int):
        mujoco = import_mujoco()
        if not os.environ.get("LP_PERF"):
            os.environ["LP_PERF"] = "no_mip_linear"  # the nearest level of a texture alone: a tenth of the time
        self._mujoco = mujoco
        self._size = size
        try:
            self._gl = mujoco.GLContext(size, size)
            self._gl.make_current()
        except Exception as error:  # each GL library has errors of its own
            chosen = ", ".join(f"{name}={os.environ[name]}" for name in GL_VARIABLES if os.environ.get(name))
            raise MissingExtra(
                f"frames cannot be drawn off screen ({chosen or 'no variable set'}): {error}. Unset the variables that "
                "you have set, or set MUJOCO_GL to the other of egl and osmesa"
            ) from error
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), np.uint8)
        self._scenes: dict[int, tuple[Any, Any, Any, Any, Any]] = {}
        self._current = -1

    def add(self, model: Any, camera: str, *, hidden_groups: Collection[int] = ()) -> int:
        """Prepare to draw `model` from `camera`, without the geoms of some groups.

        Returns:
            The number to pass to `render`.
        """
        mujoco = self._mujoco
        model.vis.global_.offwidth = model.vis.global_.offheight = self._size
        scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 100)
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = bool(model.mat_reflectance.any())
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = model.camera(camera).id
        option = mujoco.MjvOption()
        option.geomgroup[list(hidden_groups)] = 0
        self._gl.make_current()
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        number = len(self._scenes)
        self._scenes[number] = (model, scene, option, view, context)
        self._current = -1
        return number

    def render(self, number: int, data: Any) -> np.ndarray:
        """The frame u8[H W 3] of scene `number` in state `data`, rows as GL has them (bottom first)."""
        mujoco = self._mujoco
        model, scene, option, view, context = self._scenes[number]
        if self._current != number:  # each context owns a frame buffer; drawing into another's returns its frame
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            self._current = number
        mujoco.mjv_updateScene(model, data, option, None, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
        mujoco.mjr_render(self._rect, scene, context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, context)
        return self._pixels

    def close(self) -> None:
        """Free the scenes and the context."""
        self._gl.make_current()
        for *_, context in self._scenes.values():
            context.free()
        self._scenes.clear()
        self._gl.free()
