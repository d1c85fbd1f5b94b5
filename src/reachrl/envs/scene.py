"""Reduced MuJoCo scenes, for rendering on a CPU.

Software rendering costs per triangle, hardly per pixel. So shadows, reflections and multisampling are
off, and visual meshes are simplified once, when the scene is built; the result is cached on disk.
"""

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.envs.gl import import_mujoco
from reachrl.envs.meshes import simplified
from reachrl.home import cache_folder
from reachrl.run.atomic import aside
from reachrl.run.file_names import file_name

logger = logging.getLogger(__name__)

_TEXTURE_SIZE = 256  # pixels; larger textures cost memory in every worker and cannot be seen in small frames
_CUBE_SIZE = 128  # pixels; a cube texture holds its picture six times
_HIDDEN_GROUP = 3  # geom groups 3..5 are not drawn by default, and inertia comes from groups 4 and 5 only
_ROUNDNESS = (12, 6)  # slices and stacks of drawn round primitives; MuJoCo's 28, 16 cost a quarter more a frame
_PLANE_GRID_M = 1.0  # spacing of the grid a plane is drawn as
_FORMAT = 8  # part of the cache key: raise it when the scenes built here change


def load_scene(xml: Path, mesh_faces: int) -> Any:
    """The `MjModel` of `xml`, prepared for cheap frames, built once per machine and then read from a cache.

    Args:
        xml: the scene.
        mesh_faces: visual meshes are simplified to about this many faces; 0 leaves them alone.

    Returns:
        A model whose physics equal those of `mujoco.MjModel.from_xml_path(xml)`.
    """
    return cached_model(xml.stem, f"{mesh_faces} {xml} {xml.stat().st_mtime_ns}", lambda: build_scene(xml, mesh_faces))


def cached_model(stem: str, key: str, build: Callable[[], Any]) -> Any:
    """The `MjModel` that `build` makes, from the cache on disk where it was made before.

    Args:
        stem: how its file is called.
        key: changes whenever `build` would make something else.
        build: makes it; called by one process of a machine at a time.
    """
    mujoco = import_mujoco()
    key = f"{_FORMAT} {mujoco.__version__} {_TEXTURE_SIZE} {key}"
    folder = cache_folder() / "scenes"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = folder / file_name(stem, f"-{digest}.mjb")
    model = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):  # many workers start at once: one builds, the others read
            if path.exists():
                with contextlib.suppress(ValueError):  # a damaged file is built again
                    return mujoco.MjModel.from_binary_path(str(path))
            model = build()
            _save(mujoco, model, path)
            return model
    except OSError as error:
        logger.debug("scene cache %s is not usable (%s); building the scene in memory", folder, error)
        return build() if model is None else model


def _save(mujoco: Any, model: Any, path: Path) -> None:
    """Write a compiled scene in one piece."""
    copy = aside(path)
    try:
        mujoco.mj_saveModel(model, str(copy), None)
        copy.replace(path)
    finally:
        copy.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_scene(xml: Path, mesh_faces: int) -> Any:
    """Compile `xml` with simplified visual meshes, small textures and no costly effects."""
    mujoco = import_mujoco()
    spec = mujoco.MjSpec.from_file(str(xml))
    if mesh_faces:
        _simplify_meshes(mujoco, spec, xml.parent / spec.meshdir, mesh_faces)
    return compiled(spec, xml.parent / spec.texturedir)


def compiled(
    spec: Any, textures: Path, *, quads: int = 1, plane_grid_m: float = _PLANE_GRID_M, mirrors: bool = False
) -> Any:
    """The `MjModel` of `spec` with small textures and no costly effects.

    Args:
        spec: an `MjSpec`.
        textures: folder of its textures.
        quads: pieces along an edge of a drawn box; lighting is computed at their corners (MuJoCo's default is 4).
        plane_grid_m: least spacing of the grid a plane is drawn as.
        mirrors: keep what reflects; each such surface in view is drawn with a second pass.
    """
    mujoco = import_mujoco()
    _shrink_textures(mujoco, spec, textures)
    quality = spec.visual.quality
    quality.offsamples = quality.shadowsize = 0
    quality.numslices, quality.numstacks = _ROUNDNESS
    quality.numquads = quads
    model = spec.compile()
    # A plane's third size serves nothing but drawing: Meta-World's floor was 12,800 triangles.
    planes = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[planes, 2] = np.maximum(model.geom_size[planes, 2], plane_grid_m)
    model.light_castshadow[:] = 0
    if not mirrors:
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
