"""Where things are: points on the surfaces of a scene's colliding geoms."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from reachrl.envs.gl import import_mujoco

_SPACING_M = 0.005


class Surfaces:
    """Points on the surface of each colliding geom, in the geom's own frame, made once per model.

    Args:
        model: an `MjModel`.
    """

    def __init__(self, model: Any):
        self._model = model
        collides = (model.geom_contype | model.geom_conaffinity) != 0
        self._local = {int(geom): _surface(model, int(geom)) for geom in np.flatnonzero(collides)}

    def geoms_of(self, bodies: Iterable[int]) -> list[int]:
        """The colliding geoms of `bodies`."""
        wanted = set(bodies)
        return [geom for geom in self._local if int(self._model.geom_bodyid[geom]) in wanted]

    def points(self, data: Any, geoms: Iterable[int]) -> np.ndarray:
        """World points f64[P 3] on `geoms` in state `data`."""
        found = [
            self._local[geom] @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
            for geom in geoms
            if len(self._local[geom])
        ]
        return np.concatenate(found) if found else np.zeros((0, 3))


def subtree(model: Any, body: int) -> list[int]:
    """`body` and all bodies that hang on it."""
    found = [body]
    for other in range(body + 1, model.nbody):
        if model.body_parentid[other] in found:
            found.append(other)
    return found


def _surface(model: Any, geom: int) -> np.ndarray:
    kinds, kind, size = import_mujoco().mjtGeom, model.geom_type[geom], model.geom_size[geom]
    if kind == kinds.mjGEOM_BOX:
        return _box(size)
    if kind == kinds.mjGEOM_CYLINDER:
        return _cylinder(size[0], size[1])
    if kind in (kinds.mjGEOM_SPHERE, kinds.mjGEOM_CAPSULE, kinds.mjGEOM_ELLIPSOID):
        return _cylinder(size[0], size[0] + (size[1] if kind == kinds.mjGEOM_CAPSULE else 0.0))
    if kind == kinds.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        first, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        vertices = model.mesh_vert[start : start + count].astype(float)
        corners = vertices[model.mesh_face[first : first + faces]]
        return np.concatenate([vertices, corners.mean(1), *(0.5 * (corners + np.roll(corners, 1, 1))).swapaxes(0, 1)])
    return np.zeros((0, 3))  # planes: the floor is a height, not a surface


def _ticks(half: float) -> np.ndarray:
    return np.linspace(-half, half, max(2, min(60, round(2 * half / _SPACING_M) + 1)))


def _box(half: np.ndarray) -> np.ndarray:
    sides = []
    for axis in range(3):
        a, b = [other for other in range(3) if other != axis]
        first, second = (grid.ravel() for grid in np.meshgrid(_ticks(half[a]), _ticks(half[b])))
        for sign in (-1.0, 1.0):
            side = np.zeros((len(first), 3))
            side[:, a], side[:, b], side[:, axis] = first, second, sign * half[axis]
            sides.append(side)
    return np.concatenate(sides)


def _cylinder(radius: float, half_height: float) -> np.ndarray:
    turns = np.linspace(0, 2 * np.pi, max(8, round(2 * np.pi * radius / _SPACING_M)), endpoint=False)
    circle = np.stack([np.cos(turns), np.sin(turns)], -1)
    wall = [np.column_stack([radius * circle, np.full(len(turns), z)]) for z in _ticks(half_height)]
    caps = [
        np.column_stack([share * radius * circle, np.full(len(turns), z)])
        for share in (0.25, 0.5, 0.75)
        for z in (-half_height, half_height)
    ]
    return np.concatenate([*wall, *caps])
