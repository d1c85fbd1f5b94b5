"""Simpler surfaces for drawing, and where their pictures go."""

from pathlib import Path
from typing import Any

import numpy as np

from reachrl.errors import MissingExtra

_CARE = 3  # fast-simplification's aggressiveness: its default of 7 tears holes, 1 stops far above the target
_DETAILED = 10  # a mesh of more than so many times the wanted faces loses its smallest pieces
_SMALLEST_PIECE = 0.3  # of the mesh's diagonal; the arm's links hold dozens of screws and hidden parts
_INWARD = 0.2  # how far from a corner towards the middle of its triangle a picture coordinate is looked up
_FACING = 0.05  # of the mesh's diagonal; how far away a surface that faces a right angle elsewhere counts as lying
_STRETCH = 4.0  # a corner's picture coordinate further from the middle's than so many times the usual is across a seam


def simplified(path: Path, faces: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The surface in mesh file `path` with about `faces` triangles; one in great detail loses its screws as well.

    Returns:
        Vertices f32[V 3] and faces i32[F 3]; None where the file has no more than `faces` already.

    Raises:
        MissingExtra: the packages that do it are not installed.
    """
    mesh: Any = _trimesh().load_mesh(path)
    return None if len(mesh.faces) <= faces else _decimated(mesh, faces)


def simplified_triangles(
    vertices: np.ndarray, triangles: np.ndarray, faces: int, *, all_pieces: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """Like `simplified`, of a surface in memory: vertices f64[V 3], triangles i[F 3]; none is left out on request.

    Raises:
        MissingExtra: the packages that do it are not installed.
    """
    if len(triangles) <= faces:
        return None
    return _decimated(_trimesh().Trimesh(vertices, triangles, process=True), faces, all_pieces=all_pieces)


def _trimesh() -> Any:
    try:
        import fast_simplification  # noqa: F401  (trimesh uses it)
        import trimesh
    except ImportError as error:
        raise MissingExtra(
            f"simplifying meshes needs trimesh and fast-simplification ({error}); run  pip install 'reachrl[metaworld]'"
            "  or set env.mesh_faces=0 (frames then cost several times more)"
        ) from error
    return trimesh


def _decimated(mesh: Any, faces: int, *, all_pieces: bool = False) -> tuple[np.ndarray, np.ndarray]:
    if len(mesh.faces) > _DETAILED * faces and not all_pieces:
        mesh.update_faces(_large_pieces(mesh, faces))
        mesh.remove_unreferenced_vertices()
    if len(mesh.faces) > faces:
        mesh = mesh.simplify_quadric_decimation(face_count=faces, aggression=_CARE)
    return mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32)


def _large_pieces(mesh: Any, faces: int) -> np.ndarray:
    """Which faces belong to the large connected pieces, bool[F]; at least `faces` of them, from the largest on."""
    groups = _trimesh().graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    pieces = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    extents = np.array([np.linalg.norm(np.ptp(mesh.vertices[mesh.faces[piece].ravel()], axis=0)) for piece in pieces])
    order = np.argsort(-extents, kind="stable")
    before = np.cumsum([0, *(len(pieces[group]) for group in order[:-1])])  # faces in pieces larger than this one
    kept = order[(extents[order] >= _SMALLEST_PIECE * mesh.scale) | (before < faces)]
    return np.isin(groups, kept)


def picture_coordinates(
    corners: np.ndarray, vertices: np.ndarray, triangles: np.ndarray, coordinates: np.ndarray
) -> np.ndarray:
    """Where in its picture each corner of a simplified surface lies: what the nearest point of the original shows.

    Nearest among those that face the same way: a dish is thin, and its underside has another picture. A triangle that
    bridges a seam of the picture would be smeared across it; its corners take the colour of its middle.

    Args:
        corners: of the simplified triangles f64[F 3 3].
        vertices: of the original f64[V 3].
        triangles: of the original i[T 3].
        coordinates: of the original's corners f64[T 3 2].

    Returns:
        f32[F 3 2].
    """
    from scipy.spatial import KDTree

    original = vertices[triangles]
    middles, middle_uv = original.mean(1), coordinates.mean(1)
    inner = original + _INWARD * (middles[:, None] - original)
    inner_uv = coordinates + _INWARD * (middle_uv[:, None] - coordinates)
    facing = _FACING * np.linalg.norm(np.ptp(vertices, axis=0))
    points = np.concatenate([middles, inner.reshape(-1, 3)])
    normals = _normals(original)
    tree = KDTree(np.concatenate([points, facing * np.concatenate([normals, np.repeat(normals, 3, axis=0)])], axis=1))
    known = np.concatenate([middle_uv, inner_uv.reshape(-1, 2)])
    middle = corners.mean(1, keepdims=True)
    asked = np.concatenate([corners + _INWARD * (middle - corners), middle], axis=1)  # [F 4 3]
    ways = np.repeat(facing * _normals(corners), 4, axis=0)
    found = known[tree.query(np.concatenate([asked.reshape(-1, 3), ways], axis=1))[1]].reshape(-1, 4, 2)
    uv, uv_middle = found[:, :3], found[:, 3:]
    lengths = np.linalg.norm(original - np.roll(original, 1, axis=1), axis=-1).sum()
    density = np.linalg.norm(coordinates - np.roll(coordinates, 1, axis=1), axis=-1).sum() / max(lengths, 1e-12)
    reach = np.linalg.norm(asked[:, :3] - asked[:, 3:], axis=-1, keepdims=True)
    torn = np.linalg.norm(uv - uv_middle, axis=-1, keepdims=True) > _STRETCH * density * reach
    return np.where(torn, uv_middle, uv).astype(np.float32)


def _normals(corners: np.ndarray) -> np.ndarray:
    """The unit normals f64[F 3] of triangles f64[F 3 3]; zero where a triangle has no area."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
