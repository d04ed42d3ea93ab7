"""Shape metrics against brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.metrics.geometry import sample_surface, surface_distance, voxel_iou
from diff2to3.types import Material, Mesh

voxels = st.sets(st.tuples(*[st.integers(0, 3)] * 3), max_size=30)


@given(a=voxels, b=voxels)
@settings(max_examples=50, deadline=None)
def test_voxel_iou_is_that_of_python_sets(a, b):
    tensors = [torch.tensor(sorted(s), dtype=torch.int32).reshape(-1, 3) for s in (a, b)]
    assert voxel_iou(*tensors) == (len(a & b) / len(a | b) if a | b else 1.0)


def test_voxel_iou_refuses_what_is_not_a_set_of_voxels():
    one = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="duplicate"):
        voxel_iou(torch.cat([one, one]), one)
    with pytest.raises(ValueError, match="coords: expected integers"):
        voxel_iou(one.float(), one)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 10.0])
def test_surface_distance_by_brute_force(generator, threshold):
    a, b = torch.rand(60, 3, generator=generator), torch.rand(45, 3, generator=generator)
    between = (a.double()[:, None] - b.double()[None]).norm(dim=-1)
    there, back = between.min(1).values, between.min(0).values
    result = surface_distance(a, b, threshold)
    assert result.chamfer == pytest.approx(float(there.mean() + back.mean()) / 2, rel=1e-12)
    precision, recall = (
        float((there <= threshold).double().mean()),
        float((back <= threshold).double().mean()),
    )
    assert (result.precision, result.recall) == (pytest.approx(precision), pytest.approx(recall))
    assert result.f_score == pytest.approx(2 * precision * recall / (precision + recall))


def test_surface_distance_of_equal_far_and_bad_sets():
    points = torch.eye(3)
    assert surface_distance(points, points) == (0, 1, 1, 1)
    assert surface_distance(points, points + 5).f_score == 0
    with pytest.raises(ValueError, match=r"points: expected \[N, 3\] with N >= 1"):
        surface_distance(points[:0], points)
    with pytest.raises(ValueError, match="truth: NaN"):
        surface_distance(points, points / 0)
    with pytest.raises(ValueError, match="threshold"):
        surface_distance(points, points, 0)


def square(side: float, z: float) -> tuple[np.ndarray, np.ndarray]:
    corners = np.array([[0, 0, z], [side, 0, z], [side, side, z], [0, side, z]], np.float32)
    return corners, np.array([[0, 1, 2], [0, 2, 3]], np.int32)


def test_points_lie_on_the_surface_in_proportion_to_area():
    (small, faces), (large, _) = square(0.1, 0.0), square(0.3, 0.5)
    mesh = Mesh(
        np.concatenate([small, large]),
        np.concatenate([faces, faces + 4]),
        np.zeros(4, np.int32),
        (Material(),),
    )
    points = sample_surface(mesh, 4000, np.random.default_rng(0)).numpy()
    on_large = points[:, 2] == 0.5
    assert set(points[:, 2].tolist()) == {0.0, 0.5}
    assert on_large.mean() == pytest.approx(0.9, abs=0.02)
    spread = points[on_large][:, :2] / 0.3
    assert spread.min() >= 0 and spread.max() <= 1 + 1e-6
    np.testing.assert_allclose(spread.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(spread.var(0), 1 / 12, atol=0.01)
    assert ((spread[:, 0] > spread[:, 1]).mean()) == pytest.approx(0.5, abs=0.03)


def test_a_mesh_without_area_is_refused():
    mesh = Mesh(
        np.zeros((3, 3), np.float32), np.array([[0, 1, 2]], np.int32), np.zeros(1, np.int32), (Material(),)
    )
    with pytest.raises(ValueError, match="no area"):
        sample_surface(mesh, 10, np.random.default_rng(0))
