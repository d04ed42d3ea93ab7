"""Polygons as triangles: fans where they are convex, ear clipping where they are not."""

from __future__ import annotations

import numpy as np

#: A corner counts as turning inwards when its turn takes away more than this part of the polygon's area:
#: coordinates with six digits bend straight edges by less.
_REFLEX = 1e-5
#: Tests of a point against a triangle that ear clipping may take in one mesh, some 10 s. Polygons after that are fans.
_MAX_TESTS = 20_000_000

Point = tuple[float, float]


def triangulate(positions: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Triangles of many polygons, each keeping the way in which its polygon winds.

    positions  float64 [C, 3] of all corners, polygon after polygon
    sizes      int64 [P] corners of each polygon; those of fewer than 3 give nothing

    Returns rows of ``positions`` [F, 3], the polygon of each triangle [F], and how many polygons that are not
    convex became fans all the same because ear clipping them all would take too long.
    """
    starts = np.cumsum(sizes) - sizes
    counts = np.maximum(sizes - 2, 0)
    polygon = np.repeat(np.arange(len(sizes)), counts)
    first = np.cumsum(counts) - counts
    step = np.arange(len(polygon)) - first[polygon] + 1
    corner = starts[polygon]
    triangles = np.stack([corner, corner + step, corner + step + 1], 1)
    budget, num_fans = _MAX_TESTS, 0
    for index, normal in _concave(positions, starts, sizes):
        begin, size = int(starts[index]), int(sizes[index])
        flat = _flatten(positions[begin : begin + size], normal)
        ears, num_tests = _clip_ears(flat, budget)
        budget -= num_tests
        if ears is None:
            num_fans += 1
        else:
            triangles[first[index] : first[index] + size - 2] = np.array(ears, np.int64) + begin
    return triangles, polygon, num_fans


def _concave(positions: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(polygon, its normal) of all that have a corner that turns inwards."""
    rows = np.flatnonzero(sizes > 3)
    if not len(rows):
        return []
    sizes, starts = sizes[rows], starts[rows]
    begins = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(rows)), sizes)
    place = np.arange(len(owner)) - begins[owner]
    here = starts[owner] + place
    after = starts[owner] + (place + 1) % sizes[owner]
    before = starts[owner] + (place - 1) % sizes[owner]
    origin = positions[starts[owner]]
    a, b, c = positions[before] - origin, positions[here] - origin, positions[after] - origin
    normals = np.add.reduceat(np.cross(b, c), begins)  # twice the area, along the polygon's normal
    length = np.linalg.norm(normals, axis=1)
    unit = normals / np.maximum(length, 1e-300)[:, None]
    turns = (np.cross(b - a, c - b) * unit[owner]).sum(1)
    smallest = np.minimum.reduceat(turns, begins)
    found = np.flatnonzero(np.isfinite(length) & (length > 0) & (smallest < -_REFLEX * length))
    return [(int(rows[i]), unit[i]) for i in found]


def _flatten(corners: np.ndarray, normal: np.ndarray) -> list[Point]:
    """[n, 3] seen along the axis nearest to ``normal``, so that the polygon turns counter-clockwise."""
    axis = int(np.abs(normal).argmax())
    u, v = (axis + 1) % 3, (axis + 2) % 3
    if normal[axis] < 0:
        u, v = v, u
    flat = corners[:, [u, v]] - corners[0, [u, v]]
    return [(float(x), float(y)) for x, y in flat / max(float(np.abs(flat).max()), 1e-300)]


def _clip_ears(points: list[Point], budget: int) -> tuple[list[tuple[int, int, int]] | None, int]:
    """n - 2 triangles of a counter-clockwise polygon, and the tests it took; None when that is over budget.

    An ear is a corner that turns outwards with no other corner in its triangle. Corners on a triangle's edge
    keep it from being an ear at first (holes are joined to the outline by a doubled edge); where that leaves no
    ear, they are let pass, and in a polygon that crosses itself any corner is taken in the end.
    """
    n = len(points)
    before, after = [(i - 1) % n for i in range(n)], [(i + 1) % n for i in range(n)]
    turn = [_turn(points[before[i]], points[i], points[after[i]]) for i in range(n)]
    reflex = {i for i in range(n) if turn[i] < 0}
    ears: list[tuple[int, int, int]] = []
    at = misses = leniency = num_tests = 0
    while len(ears) < n - 3:
        a, c = before[at], after[at]
        is_ear = turn[at] == 0 or leniency == 3 or (turn[at] > 0 and leniency == 2)
        if not is_ear and turn[at] > 0:
            num_tests += len(reflex)
            if num_tests > budget:
                return None, num_tests
            is_ear = not _blocked(points, (a, at, c), reflex, closed=leniency == 0)
        if not is_ear:
            at, misses = c, misses + 1
            if misses > n - len(ears):
                leniency, misses = leniency + 1, 0
            continue
        ears.append((a, at, c))
        after[a], before[c] = c, a
        reflex.discard(at)
        for i in (a, c):
            turn[i] = _turn(points[before[i]], points[i], points[after[i]])
            reflex.discard(i)
            if turn[i] < 0:
                reflex.add(i)
        at, misses, leniency = after[c], 0, 0  # skipping one makes fewer slivers
    ears.append((before[at], at, after[at]))
    return ears, num_tests


def _blocked(points: list[Point], ear: tuple[int, int, int], reflex: set[int], closed: bool) -> bool:
    """Whether one of ``reflex`` lies in the triangle ``ear``; on its edges too if ``closed``."""
    a, b, c = (points[i] for i in ear)
    for i in reflex:
        p = points[i]
        if i in ear or p in (a, b, c):
            continue
        sides = (_turn(a, b, p), _turn(b, c, p), _turn(c, a, p))
        if min(sides) > 0 or (closed and min(sides) == 0):
            return True
    return False


def _turn(a: Point, b: Point, c: Point) -> float:
    """Twice the area of the triangle; positive when it turns counter-clockwise."""
    return (b[0] - a[0]) * (c[1] - b[1]) - (b[1] - a[1]) * (c[0] - b[0])
