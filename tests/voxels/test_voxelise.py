"""Voxelisation against clipping each triangle by each cell, against dense sampling, and on hand-made
cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.voxels import voxelise as module
from diff2to3.voxels.voxelise import voxelise


def clip_polygon(polygon: list[np.ndarray], axis: int, sign: float, bound: float) -> list[np.ndarray]:
    """Sutherland-Hodgman: the part of ``polygon`` with sign * x[axis] <= sign * bound."""
    kept: list[np.ndarray] = []
    for i, current in enumerate(polygon):
        previous = polygon[i - 1]
        inside, was_inside = (sign * (p[axis] - bound) <= 0 for p in (current, previous))
        if inside != was_inside:
            t = (bound - previous[axis]) / (current[axis] - previous[axis])
            crossing = previous + t * (current - previous)
            crossing[axis] = bound
            kept.append(crossing)
        if inside:
            kept.append(current)
    return kept


def clipped_cells(triangles: np.ndarray, resolution: int, margin: float) -> set[tuple[int, ...]]:
    """Cells, grown by ``margin`` cells on each side, that some triangle reaches into: brute force over all
    cells."""
    cells = set()
    for triangle in (triangles.astype(np.float64) + 0.5) * resolution:
        for cell in np.ndindex(resolution, resolution, resolution):
            polygon = list(triangle)
            for axis in range(3):
                polygon = clip_polygon(polygon, axis, -1.0, cell[axis] - margin)
                polygon = clip_polygon(polygon, axis, 1.0, cell[axis] + 1 + margin)
            if polygon:
                cells.add(cell)
    return cells


def as_set(coords: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(int(c) for c in row) for row in coords}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), resolution=st.integers(1, 7), shrink=st.sampled_from([1.0, 0.3, 0.02]))
def test_equals_clipping_every_cell(seed: int, resolution: int, shrink: float) -> None:
    rng = np.random.default_rng(seed)
    centers = rng.uniform(-0.4, 0.4, (3, 1, 3))
    triangles = np.clip(centers + shrink * rng.uniform(-0.6, 0.6, (3, 3, 3)), -0.5, 0.5)
    got = as_set(voxelise(triangles, resolution))
    # Random triangles touch no cell border exactly, so growing or shrinking the cells by rounding changes
    # nothing.
    assert clipped_cells(triangles, resolution, -1e-9) <= got <= clipped_cells(triangles, resolution, 1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), resolution=st.sampled_from([2, 4, 8]))
def test_lattice_triangles_mark_every_cell_they_enter_and_none_they_miss(seed: int, resolution: int) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.integers(
        0, 2 * resolution + 1, (4, 3, 3)
    )  # on half-cell lattice points: contacts are exact
    triangles = corners / (2 * resolution) - 0.5
    got = as_set(voxelise(triangles, resolution))
    assert clipped_cells(triangles, resolution, -1e-9) <= got <= clipped_cells(triangles, resolution, 1e-9)
    sampled = (triangles.reshape(-1, 3) + 0.5) * resolution
    assert as_set(np.minimum(np.floor(sampled), resolution - 1).astype(int)) <= got


@pytest.mark.parametrize("resolution", [32, 64, 256])
def test_contains_every_sampled_surface_point(resolution: int) -> None:
    rng = np.random.default_rng(3)
    triangles = rng.uniform(-0.5, 0.5, (20, 3, 3)).astype(np.float32)
    triangles[10:] = triangles[10:, :1] * 0.9 + 0.01 * rng.standard_normal((10, 3, 3))
    weights = rng.dirichlet(np.ones(3), 20_000)
    points = np.einsum("sk,fkc->fsc", weights, triangles.astype(np.float64)).reshape(-1, 3)
    cells = np.clip(np.floor((points + 0.5) * resolution), 0, resolution - 1).astype(int)
    assert as_set(cells) <= as_set(voxelise(triangles, resolution))


def test_number_of_cells_of_an_inclined_plane_is_the_analytic_one() -> None:
    # The plane x + y + z = 0 (through the grid's centre) crosses, open or touching, cells with -3 <= i+j+k -
    # 3R/2 <= 0.
    r = 8
    big = np.array([[[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]]) * 0.5 + 0
    i, j, k = np.indices((r, r, r))
    # The triangle is the part of the plane with every coordinate >= -0.25, i.e. index >= r/4 (touching
    # included).
    total = i + j + k - 3 * r // 2
    expected = (total >= -3) & (total <= 0) & (np.minimum(np.minimum(i, j), k) >= r // 4)
    got = np.zeros((r, r, r), bool)
    got[tuple(voxelise(big, r).T)] = True
    interior = (np.minimum(np.minimum(i, j), k) >= r // 4) & (total > -3) & (total < 0)
    assert (got & interior == interior).all() and not (got & ~expected).any()


def test_a_face_between_two_layers_marks_the_upper_one_only() -> None:
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    for axis in range(3):
        for plane, layer in ((-0.5, 0), (0.0, 4), (0.25, 6), (0.5, 7)):
            quad = np.insert(corners, axis, plane, axis=1)
            coords = voxelise(quad[[[0, 1, 2], [0, 2, 3]]], 8)
            assert len(coords) == 64 and (coords[:, axis] == layer).all()


def test_degenerate_triangles_are_points_and_segments() -> None:
    point = np.full((1, 3, 3), 0.1)
    assert voxelise(point, 8).tolist() == [[4, 4, 4]]
    segment = np.array([[[-0.45, -0.45, -0.45], [0.45, 0.45, 0.45], [0.0, 0.0, 0.0]]])
    coords = as_set(voxelise(segment, 8))
    assert {(i, i, i) for i in range(8)} <= coords <= clipped_cells(segment, 8, 1e-9)
    needle = np.array([[[-0.45, -0.4, 0.1], [0.45, 0.3, 0.2], [0.45, 0.3 + 1e-14, 0.2]]])
    assert clipped_cells(needle, 8, -1e-9) <= as_set(voxelise(needle, 8)) <= clipped_cells(needle, 8, 1e-9)


def test_output_is_sorted_unique_int32_and_independent_of_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    triangles = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 3, 3))
    whole = voxelise(triangles, 16)
    assert whole.dtype == np.int32
    assert (np.unique(whole, axis=0) == whole).all()
    monkeypatch.setattr(module, "_CHUNK", 7)
    np.testing.assert_array_equal(voxelise(triangles, 16), whole)
    np.testing.assert_array_equal(voxelise(triangles[::-1], 16), whole)


def test_empty_mesh_gives_no_cells_and_bad_input_is_named() -> None:
    assert voxelise(np.zeros((0, 3, 3), np.float32), 8).shape == (0, 3)
    with pytest.raises(ValueError, match="resolution"):
        voxelise(np.zeros((1, 3, 3)), 257)
    with pytest.raises(ValueError, match="shape"):
        voxelise(np.zeros((1, 3, 2)), 8)
    with pytest.raises(ValueError, match="finite"):
        voxelise(np.full((1, 3, 3), np.nan), 8)
    with pytest.raises(ValueError, match="normalise first"):
        voxelise(np.full((1, 3, 3), 0.6), 8)
