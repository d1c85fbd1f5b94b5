"""LIBERO's scenes with fewer triangles: the same physics, frames at a fraction of the cost.

A LIBERO scene is drawn as some 300,000 triangles, of which a frame of 128 pixels can show few. Meshes come as `.obj`,
`.stl` and MuJoCo's own `.msh`, most with a picture on them, so each is read by MuJoCo itself.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from reachrl.envs.gl import import_mujoco
from reachrl.envs.libero.simulation import HIDDEN_GROUPS
from reachrl.envs.meshes import picture_coordinates, simplified_triangles
from reachrl.envs.scene import cached_model, compiled

_SCENERY_M = 1.5  # a mesh of a longer diagonal is a room, a kitchen, a table: many things in one
_SCENERY_FACES = 10  # times the faces of others, and no piece left out
_FORMAT = 4  # part of the cache key: raise it when the scenes built here change


def slim_model(xml: str, name: str, mesh_faces: int) -> Any:
    """The `MjModel` of a composed task with visual meshes of about `mesh_faces` faces, from a cache on disk.

    Args:
        xml: the whole scene, as robosuite composes it; files are named by absolute paths.
        name: of the task, for the cache file.
        mesh_faces: 0 leaves all meshes alone.

    Returns:
        A model whose physics equal those of `mujoco.MjModel.from_xml_string(xml)`.
    """
    files = sorted(set(re.findall(r'file="([^"]+)"', xml)))
    stamps = [(file, stat.st_size, stat.st_mtime_ns) for file in files for stat in [Path(file).stat()]]
    return cached_model(name, f"libero {_FORMAT} {mesh_faces} {stamps} {xml}", lambda: _build(xml, mesh_faces))


def _build(xml: str, mesh_faces: int) -> Any:
    mujoco = import_mujoco()
    spec = mujoco.MjSpec.from_string(xml)
    physical: set[str] = set()
    drawn: set[str] = set()
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_MESH and geom.meshname:
            collides = geom.contype or geom.conaffinity
            (physical if collides or geom.group in HIDDEN_GROUPS else drawn).add(geom.meshname)
    for mesh in spec.meshes if mesh_faces else ():
        if mesh.name in drawn - physical:
            _simplify(mujoco, mesh, mesh_faces)
    return compiled(spec, Path("/"), quads=4, plane_grid_m=0.0, mirrors=True)


def _simplify(mujoco: Any, mesh: Any, mesh_faces: int) -> None:
    """Replace the surface of `mesh` by a simpler one, with its picture."""
    vertices, triangles, coordinates = read_mesh(mesh.file, mesh.scale, mesh.refpos, mesh.refquat)
    scenery = np.linalg.norm(np.ptp(vertices, axis=0)) > _SCENERY_M
    faces = mesh_faces * _SCENERY_FACES if scenery else mesh_faces
    simple = simplified_triangles(vertices, triangles, faces, all_pieces=bool(scenery))
    if simple is None:
        return
    points, faces = simple
    mesh.file = ""
    mesh.scale, mesh.refpos, mesh.refquat = np.ones(3), np.zeros(3), np.array([1.0, 0, 0, 0])
    mesh.uservert, mesh.userface = points.ravel(), faces.ravel()
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL  # a simplified surface need not be closed
    if coordinates is not None:
        found = picture_coordinates(points[faces].astype(float), vertices, triangles, coordinates)
        mesh.usertexcoord = found.ravel()
        mesh.userfacetexcoord = np.arange(faces.size, dtype=np.int32)


def read_mesh(
    file: str, scale: np.ndarray, refpos: np.ndarray, refquat: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A mesh file as MuJoCo understands it, in the coordinates of its geom.

    Returns:
        Vertices f64[V 3], triangles i[F 3] and picture coordinates of their corners f64[F 3 2], or None without.
    """
    mujoco = import_mujoco()
    spec = mujoco.MjSpec()
    mesh = spec.add_mesh(name="mesh", file=file, scale=scale, refpos=refpos, refquat=refquat)
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="mesh")
    model = spec.compile()
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, model.mesh_quat[0])
    # MuJoCo stores a mesh about its centre and along its axes of inertia.
    vertices = model.mesh_vert.astype(float) @ rotation.reshape(3, 3).T + model.mesh_pos[0]
    coordinates = model.mesh_texcoord[model.mesh_facetexcoord].astype(float) if model.nmeshtexcoord else None
    return vertices, model.mesh_face.copy(), coordinates
