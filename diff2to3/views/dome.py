"""How much of the dome each point of the surface sees, computed once a mesh and read by every view.

The dome's light changes slowly over a face and not at all from view to view, so it is traced on a grid of
points over each side of each face that some view sees, and interpolated in between. 150 views then pay for
it once.

The grid of a face has its longest edge as base: rows of points parallel to it shrink towards the opposite
corner. That needs few points on needle triangles, and one on triangles smaller than the grid's pitch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diff2to3.views.surface import Surface

#: Share by which grid points are drawn in from the outline of their face, so that a wall that begins there
#: is seen.
_INSET = 2e-3
#: Grid points that see less than this lie inside another part of the asset. They say nothing about the visible part of
#: their face, and would darken it along the line where the two parts meet.
_BURIED = 0.01
#: No face gets more points than this along one side.
_MAX_STEPS = 512
#: Points traced at once.
_CHUNK = 1 << 18


class DomeCache:
    """Values on the front (side 0) and back (side 1) of faces, found when first asked for.

    ``visibility(points, flat, shading)`` traces n points: positions, normals on the side in question and
    shading normals on that side, float32 [n, 3] each -> float32 [n]. ``pitch`` is the distance of grid
    points.
    """

    def __init__(
        self,
        surface: Surface,
        pitch: float,
        visibility: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self._surface, self._visibility = surface, visibility
        corners = surface.mesh.triangles.astype(np.float64)
        edges = np.stack(
            [corners[:, (k + 2) % 3] - corners[:, (k + 1) % 3] for k in range(3)], 1
        )  # opposite corner k
        lengths = np.linalg.norm(edges, axis=2)
        self._apex = lengths.argmax(1)
        base = lengths.max(1)
        height = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / np.maximum(base, 1e-38)
        self._columns, self._rows = (
            np.ceil(x / pitch).astype(np.int64).clip(1, _MAX_STEPS) for x in (base, height)
        )
        small = base < pitch
        self._columns[small] = self._rows[small] = 0
        self._num_points = (self._columns + 1) * (self._rows + 1)
        self._offsets = np.full((2, len(corners)), -1, np.int64)
        self._values = np.zeros(0, np.float32)

    def read(self, faces: np.ndarray, sides: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Values at points of faces: int [n], int [n] in {0, 1}, barycentric [n] -> float32 [n]."""
        self._fill(faces, sides)
        columns, rows = self._columns[faces], self._rows[faces]
        apex = self._apex[faces]
        weights = np.stack([1 - u - v, u, v], 1)
        at = np.arange(len(faces))
        up, right = weights[at, apex], weights[at, (apex + 2) % 3]
        y = np.clip(up, 0, 1) * rows
        x = np.clip(right / np.maximum(1 - up, 1e-6), 0, 1) * columns
        x0, y0 = np.minimum(x.astype(np.int64), columns), np.minimum(y.astype(np.int64), rows)
        x1, y1 = np.minimum(x0 + 1, columns), np.minimum(y0 + 1, rows)
        fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
        base, stride = self._offsets[sides, faces], columns + 1
        low, high = base + y0 * stride, base + y1 * stride
        total, weight = np.zeros(len(faces), np.float32), np.zeros(len(faces), np.float32)
        for index, share in (
            (low + x0, (1 - fx) * (1 - fy)),
            (low + x1, fx * (1 - fy)),
            (high + x0, (1 - fx) * fy),
            (high + x1, fx * fy),
        ):
            value = self._values[index]
            share = share * (value > _BURIED)
            total += share * value
            weight += share
        return total / np.maximum(weight, np.float32(1e-6))

    def _fill(self, faces: np.ndarray, sides: np.ndarray) -> None:
        """Trace the grids of those (side, face) pairs that have none yet."""
        wanted = np.zeros(self._offsets.shape, bool)
        wanted[sides, faces] = True
        new_sides, new_faces = np.nonzero(wanted & (self._offsets < 0))
        if not len(new_faces):
            return
        counts = self._num_points[new_faces]
        ends = np.cumsum(counts)
        self._offsets[new_sides, new_faces] = len(self._values) + ends - counts
        values = np.empty(int(ends[-1]), np.float32)
        for start in range(0, len(values), _CHUNK):
            stop = min(start + _CHUNK, len(values))
            which = np.searchsorted(ends, np.arange(start, stop), side="right")
            index = np.arange(start, stop) - (ends - counts)[which]
            values[start:stop] = self._trace(new_faces[which], new_sides[which], index)
        self._values = np.concatenate([self._values, values])

    def _trace(self, faces: np.ndarray, sides: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Values at the grid points ``index`` [n] of faces."""
        columns, rows = self._columns[faces], self._rows[faces]
        across, up = (
            index % (columns + 1) / np.maximum(columns, 1),
            index // (columns + 1) / np.maximum(rows, 1),
        )
        centre = columns == 0
        weights = np.empty((len(faces), 3))
        at, apex = np.arange(len(faces)), self._apex[faces]
        weights[at, apex] = up
        weights[at, (apex + 1) % 3] = (1 - up) * (1 - across)
        weights[at, (apex + 2) % 3] = (1 - up) * across
        weights = weights * (1 - _INSET) + _INSET / 3
        weights[centre] = 1 / 3
        u, v = weights[:, 1].astype(np.float32), weights[:, 2].astype(np.float32)
        turn = np.where(sides == 1, np.float32(-1), np.float32(1))[:, None]
        points = self._surface.positions(faces, u, v)
        flat = self._surface.normals[faces] * turn
        shading = self._surface.shading_normals(faces, u, v) * turn
        return self._visibility(points, flat, shading)
