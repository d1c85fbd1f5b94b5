"""Small MuJoCo scenes and fast off-screen frames: what makes pixels affordable on a CPU.

Software rendering costs per triangle, hardly per pixel. So shadows, reflections and multisampling are
off, and visual meshes are simplified once, when the scene is built; the result is cached on disk.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.errors import MissingExtra

logger = logging.getLogger(__name__)

_BACK_ENDS = ("", "egl", "osmesa", "glfw", "glx", "cgl", "wgl")  # what MuJoCo can draw with
_LIBRARIES = {"egl": ("libEGL.so.1", "libEGL.so"), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}
_TEXTURE_SIZE = 256  # pixels; larger textures cost memory in every worker and cannot be seen in small frames
_CUBE_SIZE = 128  # pixels; a cube texture holds its picture six times
_HIDDEN_GROUP = 3  # geom groups 3..5 are not drawn by default, and inertia comes from groups 4 and 5 only
_CARE = 3  # fast-simplification's aggressiveness: its default of 7 tears holes, 1 stops far above the target
_DETAILED = 10  # a mesh of more than so many times the wanted faces loses its smallest pieces
_SMALLEST_PIECE = 0.3  # of the mesh's diagonal; the arm's links hold dozens of screws and hidden parts
_ROUNDNESS = (12, 6, 1)  # slices, stacks and quads of drawn primitives; MuJoCo's 28, 16, 4 cost a quarter more a frame
_PLANE_GRID_M = 1.0  # spacing of the grid a plane is drawn as
_FORMAT = 8  # part of the cache key: raise it when the scenes built here change


def choose_gl() -> str:
    """Pick the off-screen GL back end of this process; call before MuJoCo is imported.

    Returns:
        `egl` or `osmesa` (or what the user put in `MUJOCO_GL`).

    Raises:
        MissingExtra: neither library is installed.
    """
    # Draw in the calling thread: the workers themselves fill the cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    os.environ.setdefault("LP_PERF", "no_mip_linear")  # the nearest level of a texture alone: a tenth of a frame's time
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


def load_scene(xml: Path, mesh_faces: int) -> Any:
    """The `MjModel` of `xml`, prepared for cheap frames, built once per machine and then read from a cache.

    Args:
        xml: the scene.
        mesh_faces: visual meshes are simplified to about this many faces; 0 leaves them alone.

    Returns:
        A model whose physics equal those of `mujoco.MjModel.from_xml_path(xml)`.
    """
    mujoco = import_mujoco()
    key = f"{_FORMAT} {mujoco.__version__} {mesh_faces} {_TEXTURE_SIZE} {xml} {xml.stat().st_mtime_ns}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reachrl" / "scenes"
    path = folder / f"{xml.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.mjb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):  # many workers start at once: one builds, the others read
            if path.exists():
                with contextlib.suppress(ValueError):  # a damaged file is built again
                    return mujoco.MjModel.from_binary_path(str(path))
            model = build_scene(xml, mesh_faces)
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            mujoco.mj_saveModel(model, str(aside), None)
            aside.replace(path)
            return model
    except OSError as error:
        logger.debug("scene cache %s is not usable (%s); building the scene in memory", folder, error)
        return build_scene(xml, mesh_faces)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_scene(xml: Path, mesh_faces: int) -> Any:
    """Compile `xml` with simplified visual meshes, small textures and no costly effects."""
    mujoco = import_mujoco()
    spec = mujoco.MjSpec.from_file(str(xml))
    if mesh_faces:
        _simplify_meshes(mujoco, spec, xml.parent / spec.meshdir, mesh_faces)
    _shrink_textures(mujoco, spec, xml.parent / spec.texturedir)
    quality = spec.visual.quality
    quality.offsamples = quality.shadowsize = 0
    quality.numslices, quality.numstacks, quality.numquads = _ROUNDNESS
    model = spec.compile()
    # A plane's third size serves nothing but drawing: Meta-World's floor was 12,800 triangles.
    planes = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[planes, 2] = np.maximum(model.geom_size[planes, 2], _PLANE_GRID_M)
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    return model


def _simplify_meshes(mujoco: Any, spec: Any, folder: Path, mesh_faces: int) -> None:
    geoms: dict[str, list[Any]] = {}
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_MESH and geom.meshname:
            geoms.setdefault(geom.meshname, []).append(geom)
    for mesh in list(spec.meshes):
        if not mesh.file.lower().endswith(".stl"):
            continue
        simple = simplified(folder / mesh.file, mesh_faces)
        if simple is None:
            continue
        if not any(geom.contype or geom.conaffinity or geom.name for geom in geoms.get(mesh.name, [])):
            _set_triangles(mujoco, mesh, *simple)
            continue
        # A mesh that collides keeps its shape, and one whose geom has a name keeps its centre, which task code
        # may read (a door handle's position); a simple double without collisions is drawn in its place.
        double = spec.add_mesh(name=f"{mesh.name}_drawn", scale=mesh.scale, refpos=mesh.refpos, refquat=mesh.refquat)
        _set_triangles(mujoco, double, *simple)
        for geom in geoms[mesh.name]:
            _draw_double(mujoco, geom, double.name)


def simplified(path: Path, faces: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The surface in mesh file `path` with about `faces` triangles; one in great detail loses its screws as well.

    Returns:
        Vertices f32[V 3] and faces i32[F 3]; None where the file has no more than `faces` already.

    Raises:
        MissingExtra: the packages that do it are not installed.
    """
    try:
        import fast_simplification  # noqa: F401  (trimesh uses it)
        import trimesh
    except ImportError as error:
        raise MissingExtra(
            f"simplifying meshes needs trimesh and fast-simplification ({error}); run  pip install 'reachrl[metaworld]'"
            "  or set env.mesh_faces=0 (frames then cost several times more)"
        ) from error
    mesh: Any = trimesh.load_mesh(path)
    if len(mesh.faces) <= faces:
        return None
    if len(mesh.faces) > _DETAILED * faces:
        groups = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
        pieces = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
        extents = [np.linalg.norm(np.ptp(mesh.vertices[mesh.faces[piece].ravel()], axis=0)) for piece in pieces]
        mesh.update_faces(np.isin(groups, np.flatnonzero(np.array(extents) >= _SMALLEST_PIECE * mesh.scale)))
        mesh.remove_unreferenced_vertices()
    simple = mesh.simplify_quadric_decimation(face_count=faces, aggression=_CARE)
    return simple.vertices.astype(np.float32), simple.faces.astype(np.int32)


def _set_triangles(mujoco: Any, mesh: Any, vertices: np.ndarray, faces: np.ndarray) -> None:
    mesh.file = ""
    mesh.uservert = vertices.ravel()
    mesh.userface = faces.ravel()
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL  # a simplified surface need not be closed


def _draw_double(mujoco: Any, geom: Any, mesh: str) -> None:
    double = geom.parent.add_geom(
        type=mujoco.mjtGeom.mjGEOM_MESH,
        meshname=mesh,
        pos=geom.pos,
        quat=geom.quat,
        rgba=geom.rgba,
        material=geom.material,
        group=geom.group,
        contype=0,
        conaffinity=0,
        mass=0,
    )
    for name in ("type", "axisangle", "xyaxes", "zaxis", "euler"):  # an orientation not given as a quaternion
        setattr(double.alt, name, getattr(geom.alt, name))
    geom.group = _HIDDEN_GROUP


def _shrink_textures(mujoco: Any, spec: Any, folder: Path) -> None:
    import imageio.v3 as imageio
    from PIL import Image

    for texture in spec.textures:
        if not texture.file.lower().endswith(".png"):
            continue
        picture = Image.fromarray(imageio.imread(folder / texture.file)).convert("RGB")
        largest = _TEXTURE_SIZE if texture.type == mujoco.mjtTexture.mjTEXTURE_2D else _CUBE_SIZE
        width, height = (min(side, largest) for side in picture.size)
        if (width, height) == picture.size:
            continue
        small = picture.resize((width, height), Image.Resampling.BOX)
        texture.width, texture.height, texture.nchannel = width, height, 3
        texture.data = np.asarray(small).tobytes()
        texture.file = ""


class Renderer:
    """The one off-screen GL context of this process, shared by the scenes it draws in turn."""

    def __init__(self, size: int):
        mujoco = import_mujoco()
        self._mujoco = mujoco
        self._size = size
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._option = mujoco.MjvOption()
        self._pixels = np.empty((size, size, 3), np.uint8)
        self._scenes: dict[int, tuple[Any, Any, Any, Any]] = {}
        self._current = -1

    def add(self, model: Any, camera: str) -> int:
        """Prepare to draw `model` from `camera`; returns the number to pass to `render`."""
        mujoco = self._mujoco
        model.vis.global_.offwidth = model.vis.global_.offheight = self._size
        scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 100)
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = model.camera(camera).id
        self._gl.make_current()
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        number = len(self._scenes)
        self._scenes[number] = (model, scene, view, context)
        self._current = -1
        return number

    def render(self, number: int, data: Any) -> np.ndarray:
        """The frame u8[H W 3] of scene `number` in state `data`, rows as GL has them (bottom first)."""
        mujoco = self._mujoco
        model, scene, view, context = self._scenes[number]
        if self._current != number:  # each context owns a frame buffer; drawing into another's returns its frame
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            self._current = number
        mujoco.mjv_updateScene(model, data, self._option, None, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
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
