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


def without_folds(faces: np.ndarray) -> np.ndarray:
    """Without the pairs of triangles that have the same corners and close upon each other."""
    while True:
        _, which, count = np.unique(np.sort(faces, 1), axis=0, return_inverse=True, return_counts=True)
        single = count[which.reshape(-1)] % 2 == 1
        if single.all():
            return faces
        order = np.argsort(which.reshape(-1), kind="stable")
        first = np.ones(len(faces), bool)
        first[order[1:]] = which.reshape(-1)[order[1:]] != which.reshape(-1)[order[:-1]]
        faces = faces[single & first]


def joined_sides(num_vertices: int, faces: np.ndarray) -> np.ndarray:
    """Pairs [P, 2, 4] of sides of triangles that lie on one edge and run opposite ways: the edge's ends in order, and
    the corners (3 · triangle + i) that lie there. Of an edge with more triangles than two, the n-th that runs one way
    is joined to the n-th that runs the other.
    """
    number = np.arange(len(faces))
    sides, ways = [], []
    for i in range(3):
        j = (i + 1) % 3
        a, b, corner_a, corner_b = faces[:, i], faces[:, j], 3 * number + i, 3 * number + j
        swap = a > b
        ends = (np.where(swap, b, a), np.where(swap, a, b))
        corners = (np.where(swap, corner_b, corner_a), np.where(swap, corner_a, corner_b))
        sides.append(np.stack((*ends, *corners), 1))
        ways.append(swap)
    table, way = np.concatenate(sides), np.concatenate(ways)
    runs = []
    for mask in (way, ~way):
        rows = table[mask]
        keys = rows[:, 0] * num_vertices + rows[:, 1]
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        turn = np.arange(len(keys)) - np.searchsorted(keys, keys)
        runs.append((rows, keys * 16 + np.minimum(turn, 15)))
    _, one, two = np.intersect1d(runs[0][1], runs[1][1], return_indices=True)
    return np.stack((runs[0][0][one], runs[1][0][two]), 1)


def split_crossings(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same surface, with vertices doubled where sheets touch along an edge or at a point: triangles share a vertex
    only if they are joined around it through sides that belong together.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    pairs = joined_sides(len(vertices), faces)
    ends = np.concatenate((pairs[:, :, 2], pairs[:, :, 3]))
    size = 3 * len(faces)
    graph = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), (size, size))
    _, label = connected_components(graph, directed=False)
    _, first = np.unique(label, return_index=True)
    return split_edges(vertices[faces.reshape(-1)[first]], label.reshape(-1, 3).astype(np.int64))


def split_edges(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every edge with two triangles: of one with four, whose ends are joined elsewhere, too, each pair gets a midpoint
    of its own.
    """
    while True:
        pairs = joined_sides(len(vertices), faces)
        code = pairs[:, 0, 0] * len(vertices) + pairs[:, 0, 1]
        _, which, count = np.unique(code, return_inverse=True, return_counts=True)
        pairs = pairs[count[which.reshape(-1)] > 1]
        if not len(pairs):
            return vertices, faces
        owners = pairs[:, :, 2] // 3  # a triangle is cut once a round
        _, first = np.unique(owners, return_index=True)
        chosen = np.zeros(owners.size, bool)
        chosen[first] = True
        pairs = pairs[chosen.reshape(-1, 2).all(1)]
        middle = len(vertices) + np.arange(len(pairs))
        new, gone = [], (pairs[:, :, 2] // 3).reshape(-1)
        for side in range(2):
            owner, mid = pairs[:, side, 2] // 3, middle
            for end in (2, 3):  # a copy of the triangle with the midpoint in place of one end
                piece = faces[owner].copy()
                piece[np.arange(len(owner)), pairs[:, side, end] % 3] = mid
                new.append(piece)
        vertices = np.concatenate((vertices, vertices[pairs[:, 0, :2]].mean(1)))
        faces = np.concatenate((np.delete(faces, gone, 0), *new))


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
    # edges are collapsed there without a look at what else they join
    v, f = split_crossings(np.asarray(v, np.float64), without_folds(np.asarray(f, np.int64)))
    return compact(v, f)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals [N, 3], weighted by area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    total = np.zeros((len(vertices), 3))
    for i in range(3):
        np.add.at(total, faces[:, i], normal)
    return np.asarray(total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-20))
