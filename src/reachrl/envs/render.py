"""Fast off-screen frames.

Software rendering costs per triangle, hardly per pixel: shadows and reflections are off, and the scenes that come
here have been made small (`reachrl.envs.scene`).
"""

import os
from collections.abc import Collection, Hashable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from reachrl.envs.gl import GL_VARIABLES, import_mujoco
from reachrl.errors import MissingExtra


class _Drawing(NamedTuple):
    """What a model is drawn with."""

    scene: Any
    option: Any
    view: Any
    context: Any


class Renderer:
    """An off-screen GL context for frames of one size, shared by the scenes it draws in turn.

    The environments of a process that draw frames of one size share one, see `shared`.

    Args:
        size: of a frame's side, in pixels.
    """

    _of_process: ClassVar[dict[int, "Renderer"]] = {}
    _drawing: ClassVar["Renderer | None"] = None  # whose GL context is the process's current one

    def __init__(self, size: int):
        mujoco = import_mujoco()
        if not os.environ.get("LP_PERF"):
            os.environ["LP_PERF"] = "no_mip_linear"  # the nearest level of a texture alone: a tenth of the time
        self._mujoco = mujoco
        self._size, self._users = size, 1
        try:
            self._gl = mujoco.GLContext(size, size)
            self._make_current()
        except Exception as error:  # each GL library has errors of its own
            chosen = ", ".join(f"{name}={os.environ[name]}" for name in GL_VARIABLES if os.environ.get(name))
            raise MissingExtra(
                f"frames cannot be drawn off screen ({chosen or 'no variable set'}): {error}. Unset the variables that "
                "you have set, or set MUJOCO_GL to the other of egl and osmesa"
            ) from error
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), np.uint8)
        self._scenes: dict[int, tuple[Any, _Drawing]] = {}  # a model, and what it is drawn with
        self._added = 0
        self._known: dict[Hashable, _Drawing] = {}
        self._current: Any = None  # the context whose frame buffer is drawn into

    @classmethod
    def shared(cls, size: int) -> "Renderer":
        """The one of this process for frames of this size; `close` it as often as it was asked for."""
        found = cls._of_process.get(size)
        if found is None:
            found = cls._of_process[size] = cls(size)
        else:
            found._users += 1
        return found

    def add(
        self, model: Any, camera: str, *, hidden_groups: Collection[int] = (), looks: Hashable | None = None
    ) -> int:
        """Prepare to draw `model` from `camera`, without the geoms of some groups.

        Args:
            model: what is drawn.
            camera: from where.
            hidden_groups: numbers of the groups that are left out.
            looks: equal for models with equal meshes and textures, which are then held once; None: for no other.

        Returns:
            The number to pass to `render`.
        """
        mujoco = self._mujoco
        model.vis.global_.offwidth = model.vis.global_.offheight = self._size
        key = None if looks is None else (looks, camera, tuple(hidden_groups))
        drawing = self._known.get(key)
        if drawing is None:
            scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 100)
            scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = bool(model.mat_reflectance.any())
            view = mujoco.MjvCamera()
            view.type = mujoco.mjtCamera.mjCAMERA_FIXED
            view.fixedcamid = model.camera(camera).id
            option = mujoco.MjvOption()
            option.geomgroup[list(hidden_groups)] = 0
            self._make_current()
            context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
            self._current = None
            drawing = _Drawing(scene, option, view, context)
            if key is not None:
                self._known[key] = drawing
        self._added += 1
        self._scenes[self._added] = (model, drawing)
        return self._added

    def remove(self, number: int) -> None:
        """Free what scene `number` alone is drawn with."""
        _, drawing = self._scenes.pop(number)
        others = [other for _, other in self._scenes.values()] + list(self._known.values())
        if all(other is not drawing for other in others):
            self._make_current()
            drawing.context.free()
            self._current = None

    def reload_textures(self, number: int, textures: Collection[int]) -> None:
        """Take some textures of scene `number` as its model holds them now; nobody else may draw with its looks."""
        model, drawing = self._scenes[number]
        self._make_current()
        for texture in textures:
            self._mujoco.mjr_uploadTexture(model, drawing.context, texture)

    def render(self, number: int, data: Any) -> np.ndarray:
        """The frame u8[H W 3] of scene `number` in state `data`, rows as GL has them (bottom first)."""
        mujoco = self._mujoco
        model, (scene, option, view, context) = self._scenes[number]
        self._make_current()
        if self._current is not context:  # each has a frame buffer; drawing into another's returns its frame
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            self._current = context
        mujoco.mjv_updateScene(model, data, option, None, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
        mujoco.mjr_render(self._rect, scene, context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, context)
        return self._pixels

    def close(self) -> None:
        """Free the scenes and the context, if nobody else draws with them."""
        self._users -= 1
        if self._users:
            return
        self._make_current()
        for context in {id(drawing.context): drawing.context for _, drawing in self._scenes.values()}.values():
            context.free()
        self._scenes.clear()
        self._known.clear()
        Renderer._of_process = {size: each for size, each in Renderer._of_process.items() if each is not self}
        Renderer._drawing = None
        self._gl.free()

    def _make_current(self) -> None:
        if Renderer._drawing is not self:
            self._gl.make_current()
            Renderer._drawing = self
