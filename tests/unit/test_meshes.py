"""Simplified surfaces: about as many faces as asked, whatever pieces the original is made of."""

import numpy as np
import pytest

from reachrl.envs.meshes import picture_coordinates, simplified_triangles

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("fast_simplification")


def pieces(*parts) -> tuple[np.ndarray, np.ndarray]:
    whole = trimesh.util.concatenate(parts)
    return whole.vertices, whole.faces


def screws(number: int, spread: float):
    """Small boxes of 12 faces each, side by side."""
    return [
        trimesh.creation.box((0.01,) * 3, trimesh.transformations.translation_matrix([spread * i, 0, 0]))
        for i in range(number)
    ]


def test_fewer_faces_than_asked_are_left_by_the_large_pieces():
    """One plain box under 100 screws: all of its 12 faces stay, and screws fill what is left of 60 faces."""
    vertices, faces = simplified_triangles(*pieces(trimesh.creation.box((1, 1, 1)), *screws(100, 0.02)), 60)
    assert 12 <= len(faces) <= 60
    assert np.allclose(vertices.min(0)[1:], -0.5) and np.allclose(vertices.max(0)[1:], 0.5)


def test_a_surface_of_small_pieces_alone_does_not_vanish():
    _, faces = simplified_triangles(*pieces(*screws(100, 0.1)), 60)
    assert 12 <= len(faces) <= 60


def test_screws_are_left_out_where_large_pieces_fill_what_is_asked():
    sphere = trimesh.creation.icosphere(4, 1.0)
    vertices, faces = simplified_triangles(*pieces(sphere, *screws(100, 0.2)), 200)
    distances = np.linalg.norm(vertices, axis=1)
    assert distances.min() > 0.9 and distances.max() < 1.1  # nothing of the screws, inside or outside
    assert 150 <= len(faces) < 1000


def test_scenery_keeps_all_its_pieces():
    box = trimesh.creation.box((0.3,) * 3, trimesh.transformations.translation_matrix([1.5, 0, 0]))
    kitchen = pieces(trimesh.creation.icosphere(4, 1.0), box)
    reach = [simplified_triangles(*kitchen, 400, all_pieces=kept)[0][:, 0].max() for kept in (False, True)]
    assert np.allclose(reach, [1.0, 1.65], atol=0.03)


def test_the_upper_side_of_a_thin_dish_keeps_its_own_picture():
    """Two squares 2 mm apart, each with half of a picture; the simplified upper one has sunk to the lower."""
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    up, down = np.c_[square, np.full(4, 0.001)], np.c_[square, np.full(4, -0.001)]
    triangles = np.array([[0, 1, 2], [0, 2, 3], [4, 6, 5], [4, 7, 6]])  # the lower ones face down
    halves = np.where(triangles[:, :, None] < 4, np.array([0.25, 0.5]), np.array([0.75, 0.5]))
    sunken = np.array([[[0.1, 0.1, -0.002], [0.9, 0.1, -0.002], [0.9, 0.9, -0.002]]])
    vertices = np.concatenate([up, down])
    assert np.allclose(picture_coordinates(sunken, vertices, triangles, halves)[..., 0], 0.25)
    assert np.allclose(picture_coordinates(sunken[:, ::-1], vertices, triangles, halves)[..., 0], 0.75)
