"""Meshes that say one thing each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from diff2to3.types import Material, Mesh

#: Outward normals of the cube's sides, and their colours: red, cyan, green, magenta, blue, yellow.
SIDES = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], float)
COLORS = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0]], float)


def make_mesh(
    triangles: np.ndarray, materials: tuple[Material, ...] = (Material(),), ids=None, **more
) -> Mesh:
    """A mesh of separate triangles [F, 3, 3], as they are."""
    triangles = np.asarray(triangles, np.float32)
    faces = np.arange(3 * len(triangles), dtype=np.int32).reshape(-1, 3)
    ids = np.zeros(len(triangles), np.int32) if ids is None else np.asarray(ids, np.int32)
    return Mesh(triangles.reshape(-1, 3), faces, ids, materials, **more)


def quad(center, right, up) -> np.ndarray:
    """Two triangles [2, 3, 3] of the parallelogram center ± right ± up, facing right x up."""
    c, r, u = (np.asarray(v, float) for v in (center, right, up))
    a, b, d, e = c - r - u, c + r - u, c + r + u, c - r + u
    return np.array([[a, b, d], [a, d, e]])


def make_cube(size: float = 1.0) -> Mesh:
    """A cube with one pure colour a side."""
    parts = []
    for normal in SIDES:
        right = np.roll(normal, 1)
        up = np.cross(normal, right)
        parts.append(quad(normal * size / 2, right * size / 2, up * size / 2))
    materials = tuple(Material(base_color_factor=(*map(float, color), 1.0)) for color in COLORS)
    return make_mesh(np.concatenate(parts), materials, np.repeat(np.arange(6), 2))


@pytest.fixture
def cube() -> Mesh:
    return make_cube()


@pytest.fixture
def soup() -> Callable[[int, int], Mesh]:
    def build(count: int, seed: int) -> Mesh:
        """Random triangles in the unit box with vertex colours and normals."""
        rng = np.random.default_rng(seed)
        corners = rng.uniform(-0.4, 0.4, (count, 1, 3)) + rng.uniform(-0.1, 0.1, (count, 3, 3))
        colors = rng.uniform(0, 1, (3 * count, 4)).astype(np.float32)
        normals = rng.normal(size=(3 * count, 3))
        normals = (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32)
        return make_mesh(corners, colors=colors, normals=normals)

    return build
