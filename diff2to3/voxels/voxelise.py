"""Which cells of an R³ grid over [-0.5, 0.5]³ a triangle mesh crosses: exact, watertight or not.

The test is the separating-axis theorem for a triangle and a box (Akenine-Möller 2001), arranged as by Schwarz
and Seidel (2010): of the 13 axes, the 9 edge products become 2D edge tests in the three coordinate planes, so
a triangle is first rasterised along the dominant axis of its normal and then resolved in depth. Work is
proportional to the columns a triangle covers, not to the volume of its bounding box.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

#: Candidate cells tested at once, and triangles prepared at once: together they bound the memory to some 200
#: MB whatever the mesh and the grid.
_CHUNK = 1 << 18
#: Vertices this far outside [-0.5, 0.5] (rounding of the normalisation) are moved onto its border.
_BORDER_TOLERANCE = 1e-4
#: sin(angle) below which a triangle is a segment: its computed normal is noise, so the plane test is left
#: out.
_SLIVER = 1e-10

MAX_RESOLUTION = 256

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def voxelise(triangles: NDArray[np.floating], resolution: int) -> NDArray[np.int32]:
    """Cells that the surface crosses, sorted by (x, y, z).

    A cell is half-open, [lo, hi), along each axis, so a face that lies in the plane between two layers of
    cells marks one layer, the upper; the last cell includes its upper end. Contact with an edge or a corner
    of a cell counts.

    Args:
        triangles: [F, 3, 3] corner positions (face, corner, xyz) in the object frame.
        resolution: R, 1 to 256.

    Returns:
        int32 [N, 3] cell indices in [0, R).

    Raises:
        ValueError: wrong shape, a non-finite vertex, a vertex outside [-0.5, 0.5]³, or a resolution out of
            range.
    """
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"resolution: expected 1 to {MAX_RESOLUTION}, got {resolution}")
    if triangles.ndim != 3 or triangles.shape[1:] != (3, 3):
        raise ValueError(f"triangles: expected shape [F, 3, 3], got {list(triangles.shape)}")
    occupied = np.zeros((resolution,) * 3, bool)
    for first in range(0, len(triangles), _CHUNK):
        corners = np.asarray(triangles[first : first + _CHUNK], np.float64)
        if not np.isfinite(corners).all():
            raise ValueError("triangles: positions must be finite")
        reach = np.abs(corners).max()
        if reach > 0.5 + _BORDER_TOLERANCE:
            raise ValueError(
                f"triangles: positions must be in [-0.5, 0.5], got up to {reach:.6g}; normalise first"
            )
        corners = (np.clip(corners, -0.5, 0.5) + 0.5) * resolution
        axes, degenerate = _dominant_axes(corners)
        for axis in range(3):
            chosen = axes == axis
            if chosen.any():
                order = [(axis + 1) % 3, (axis + 2) % 3, axis]  # u, v, w: w is the dominant axis
                _mark(corners[chosen][:, :, order], degenerate[chosen], occupied.transpose(order))
    return np.argwhere(occupied).astype(np.int32)


def _dominant_axes(corners: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The axis along which each triangle is seen largest, and whether it is thin enough to count as a
    segment."""
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normals = np.cross(first, second)
    third = corners[:, 2] - corners[:, 1]
    longest = np.max([np.square(e).sum(-1) for e in (first, second, third)], axis=0)
    degenerate = np.square(normals).sum(-1) <= (_SLIVER * longest) ** 2
    extents = corners.max(1) - corners.min(1)
    # A segment has no normal; looking along its longest extent it covers the fewest columns.
    axes = np.where(degenerate, extents.argmax(-1), np.abs(normals).argmax(-1))
    return axes, degenerate


def _mark(corners: NDArray[np.float64], degenerate: NDArray[np.bool_], occupied: NDArray[np.bool_]) -> None:
    """Set the cells of ``occupied`` [R, R, R] (u, v, w) that triangles [F, 3, 3] (uvw, in cells) cross."""
    last = occupied.shape[0] - 1
    low = np.minimum(np.floor(corners.min(1)), last).astype(np.int64)
    high = np.minimum(np.floor(corners.max(1)), last).astype(np.int64)
    planes = _Planes(corners, degenerate)
    edges = {pair: _edge_bounds(corners, *pair) for pair in ((0, 1), (1, 2), (2, 0))}

    sizes = high[:, :2] - low[:, :2] + 1
    for faces, local in _chunks(sizes.prod(-1)):
        u = low[faces, 0] + local // sizes[faces, 1]
        v = low[faces, 1] + local % sizes[faces, 1]
        keep = _inside(edges[0, 1], faces, u, v)
        faces, u, v = faces[keep], u[keep], v[keep]

        start, stop = planes.depth_range(faces, u, v)
        start, stop = np.maximum(start, low[faces, 2]), np.minimum(stop, high[faces, 2])
        for columns, depth in _chunks(np.maximum(stop - start + 1, 0)):
            f, cu, cv = faces[columns], u[columns], v[columns]
            cw = start[columns] + depth
            keep = planes.crosses(f, cu, cv, cw)
            keep &= _inside(edges[1, 2], f, cv, cw)
            keep &= _inside(edges[2, 0], f, cw, cu)
            occupied[cu[keep], cv[keep], cw[keep]] = True


def _chunks(counts: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (item, index within item) for ``counts[item]`` indices an item, about ``_CHUNK`` pairs at a
    time."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        stop = max(int(np.searchsorted(ends, done + _CHUNK, side="right")), first + 1)
        items = np.repeat(np.arange(first, stop), counts[first:stop])
        starts = np.repeat(ends[first:stop] - counts[first:stop], counts[first:stop])
        yield items, np.arange(done, ends[stop - 1]) - starts
        first = stop


def _edge_bounds(corners: NDArray[np.float64], a: int, b: int) -> tuple[Floats, Floats, Floats]:
    """For the three edges seen in the plane (a, b): normals [F, 3, 2] and the interval [F, 3] in which
    normal · cell must lie for the unit cell with that lower corner to overlap the triangle along the
    normal."""
    points = corners[:, :, [a, b]]
    edges = np.roll(points, -1, axis=1) - points
    normals = np.stack([-edges[..., 1], edges[..., 0]], -1)
    on_edge = (normals * points).sum(-1)
    opposite = (normals * np.roll(points, -2, axis=1)).sum(-1)
    lower = np.minimum(on_edge, opposite) - np.maximum(normals, 0).sum(-1)
    upper = np.maximum(on_edge, opposite) - np.minimum(normals, 0).sum(-1)
    return normals, lower, upper


def _inside(
    bounds: tuple[Floats, Floats, Floats], faces: NDArray[np.int64], a: Integers, b: Integers
) -> NDArray[np.bool_]:
    """Whether the unit squares with lower corners (a, b) overlap their triangles along all three edge
    normals."""
    normals, lower, upper = bounds
    keep = np.ones(len(faces), bool)
    for edge in range(3):
        offset = normals[faces, edge, 0] * a + normals[faces, edge, 1] * b
        keep &= (offset >= lower[faces, edge]) & (offset <= upper[faces, edge])
    return keep


class _Planes:
    """The planes of triangles [F, 3, 3] (uvw), as n · x = d; segments have none and pass every test."""

    def __init__(self, corners: NDArray[np.float64], degenerate: NDArray[np.bool_]) -> None:
        n = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        n[degenerate] = 0
        d = (n * corners[:, 0]).sum(-1)
        self.normals = n
        self.lower = d - np.maximum(n, 0).sum(-1)
        self.upper = d - np.minimum(n, 0).sum(-1)
        safe = np.where(degenerate, 1.0, n[:, 2])
        self.slopes = -n[:, :2] / safe[:, None]
        self.at_origin = d / safe
        self.bottom = np.floor(corners[:, :, 2].min(1)).astype(np.int64)
        self.top = np.floor(corners[:, :, 2].max(1)).astype(np.int64)
        self.degenerate = degenerate

    def depth_range(self, faces: Integers, u: Integers, v: Integers) -> tuple[Integers, Integers]:
        """First and last w of the cells over column (u, v) that the plane can cross, one cell generous."""
        su, sv = self.slopes[faces, 0], self.slopes[faces, 1]
        base = self.at_origin[faces] + su * u + sv * v
        start = np.floor(base + np.minimum(su, 0) + np.minimum(sv, 0) - 1e-6).astype(np.int64)
        stop = np.floor(base + np.maximum(su, 0) + np.maximum(sv, 0) + 1e-6).astype(np.int64)
        flat = self.degenerate[faces]
        return np.where(flat, self.bottom[faces], start), np.where(flat, self.top[faces], stop)

    def crosses(self, faces: Integers, u: Integers, v: Integers, w: Integers) -> NDArray[np.bool_]:
        """Whether the plane meets the closed unit cells with lower corners (u, v, w)."""
        n = self.normals[faces]
        offset = n[:, 0] * u + n[:, 1] * v + n[:, 2] * w
        return (offset >= self.lower[faces]) & (offset <= self.upper[faces])
