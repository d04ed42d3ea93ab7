"""Surfaces of grids by marching tetrahedra, and what is done to triangles afterwards.

Every cube is cut into six tetrahedra around its diagonal, the same way in each, so that neighbours agree. Unlike with
marching cubes no case is ambiguous: the surface is closed and every edge has two triangles, by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from diff2to3.errors import MissingDependencyError


@dataclass(frozen=True)
class TexturedMesh:
    """vertices [N, 3] float32 (z up), faces [F, 3] int32, counter-clockwise from outside, colors [N, 3] uint8 (sRGB);
    uvs [N, 2] (v up) and texture [H, W, 3] uint8 where it was unwrapped.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray
    uvs: np.ndarray | None = None
    texture: np.ndarray | None = None


def tetrahedra() -> np.ndarray:
    """Corners [6, 4, 3] of the six tetrahedra of the unit cube, positively oriented."""
    out = []
    for order in permutations(range(3)):
        corner, corners = np.zeros(3, np.int64), [np.zeros(3, np.int64)]
        for axis in order:
            corner = corner.copy()
            corner[axis] = 1
            corners.append(corner)
        edges = np.array(corners[1:]) - corners[0]
        if np.linalg.det(edges) < 0:
            corners[1], corners[2] = corners[2], corners[1]
        out.append(corners)
    return np.array(out)


def marching_tetrahedra(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The surface where a grid [X, Y, Z], whose border is below ``level``, crosses it.

    Returns:
        vertices [N, 3] in units of cells, faces [F, 3], whose normals point to lower values
    """
    shape = np.array(values.shape)
    above = values >= level
    corners = np.zeros(shape - 1, np.int64)
    for dx in (0, 1):
        for dy in (0, 1):
            for dz in (0, 1):
                corners += above[dx : shape[0] - 1 + dx, dy : shape[1] - 1 + dy, dz : shape[2] - 1 + dz]
    cells = np.argwhere((corners > 0) & (corners < 8))
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    flat, base = values.reshape(-1), cells @ strides
    each = [base[:, None] + tetrahedron @ strides for tetrahedron in tetrahedra()]  # [C, 4]
    pairs = np.concatenate([triangles(ids, flat[ids] >= level) for ids in each])
    keys = np.sort(pairs, 2)
    code = keys[..., 0] * len(flat) + keys[..., 1]
    unique, faces = np.unique(code, return_inverse=True)
    a, b = unique // len(flat), unique % len(flat)
    va, vb = flat[a].astype(np.float64), flat[b].astype(np.float64)
    # kept off the ends, where triangles would degenerate
    t = ((level - va) / (vb - va)).clip(0.02, 0.98)[:, None]
    pa, pb = (np.stack(np.unravel_index(i, values.shape), 1) for i in (a, b))
    return pa * (1 - t) + pb * t, faces.reshape(-1, 3)


def case_table() -> list[list[list[tuple[int, int]]]]:
    """For each of 16 cases (bit i: corner i is inside) the triangles, by the edges (inside, outside) that their corners
    lie on, turned so that normals point outside in a positively oriented tetrahedron.
    """
    at = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    table = []
    for case in range(16):
        inner = [i for i in range(4) if case >> i & 1]
        outer = [i for i in range(4) if not case >> i & 1]
        if len(inner) == 2:
            (a, b), (c, d) = inner, outer
            corners = [[(a, c), (a, d), (b, d)], [(a, c), (b, d), (b, c)]]
        else:
            corners = [[(i, o) for i in inner for o in outer]] if inner and outer else []
        turned = []
        for triangle in corners:
            p, q, r = (at[list(edge)].mean(0) for edge in triangle)
            outwards = np.cross(q - p, r - p) @ (at[outer].mean(0) - at[inner].mean(0)) > 0
            turned.append(triangle if outwards else triangle[::-1])
        table.append(turned)
    return table


def triangles(ids: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Triangles [T, 3, 2], by the grid points that each corner lies between, of tetrahedra [C, 4]."""
    case = inside @ np.array([1, 2, 4, 8])
    found = [np.zeros((0, 3, 2), np.int64)]
    for number, corners in enumerate(case_table()):
        if corners:
            rows = ids[case == number]
            found += [stack(rows, triangle) for triangle in corners]
    return np.concatenate(found)


def stack(rows: np.ndarray, corners: list[tuple[int, int]]) -> np.ndarray:
    return np.stack([rows[:, list(pair)] for pair in corners], 1)


def component_labels(num_vertices: int, faces: np.ndarray) -> np.ndarray:
    """The number [N] of the connected part that each vertex is in. MissingDependencyError without scipy."""
    try:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components
    except ImportError as error:
        raise MissingDependencyError("scipy", "mesh") from error
    ends = np.concatenate((faces[:, :2], faces[:, 1:]))
    graph = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), (num_vertices, num_vertices))
    return np.asarray(connected_components(graph, directed=False)[1])


def large_components(vertices: np.ndarray, faces: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Without the parts whose surface is less than ``share`` of the largest part's."""
    label = component_labels(len(vertices), faces)[faces[:, 0]]
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.bincount(label, np.linalg.norm(np.cross(b - a, c - a), axis=1), minlength=len(vertices))
    return compact(vertices, faces[(area >= share * area.max())[label]])


def compact(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the vertices that no face uses."""
    used, inverse = np.unique(faces, return_inverse=True)
    return vertices[used], inverse.reshape(-1, 3)


def simplify(vertices: np.ndarray, faces: np.ndarray, num_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``num_faces`` triangles, by quadric error. MissingDependencyError without fast-simplification."""
    if len(faces) <= num_faces:
        return vertices, faces
    try:
        import fast_simplification
    except ImportError as error:
        raise MissingDependencyError("fast-simplification", "mesh") from error
    v, f = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=num_faces
    )
    f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 0] != f[:, 2])]
    return compact(np.asarray(v, np.float64), np.asarray(f, np.int64))


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals [N, 3], weighted by area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    total = np.zeros((len(vertices), 3))
    for i in range(3):
        np.add.at(total, faces[:, i], normal)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-20)
