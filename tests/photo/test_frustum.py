"""Lifting a photo onto voxels, against cameras written out and loops."""

import math

import pytest
import torch

from diff2to3.photo.frustum import (
    DEPTH_REACH,
    fold,
    project_points,
    sample_frustum,
    sample_plane,
    to_cube,
    unfold,
    voxel_centers,
)
from diff2to3.views.photo_frame import PhotoCamera


@pytest.mark.parametrize(("elevation", "focal"), [(0.0, 1.0), (35.0, 2.5), (-9.0, 6.0)])
def test_voxels_are_seen_where_the_camera_puts_them(elevation, focal):
    camera = PhotoCamera(elevation, focal)
    points = voxel_centers(5)
    seen = project_points(points, torch.tensor([math.radians(elevation)]), torch.tensor([focal]))[0]
    rotated = points.double() @ camera.viewmat[:3, :3].double().T + camera.viewmat[:3, 3].double()
    image = rotated @ camera.K(200).double().T
    pixels = image[:, :2] / image[:, 2:]
    torch.testing.assert_close(seen[:, :2].double(), pixels / 100 - 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[:, 2].double(), rotated[:, 2] - focal, atol=1e-5, rtol=0)


def test_folding_keeps_every_cell():
    volume = torch.arange(2 * 3 * 8 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8, 8)
    folded = fold(volume)
    assert folded.shape == (2, 24, 4, 4, 4)
    assert folded[1, 8 * 2 + 0b101, 3, 1, 2] == volume[1, 2, 2 * 3 + 1, 2 * 1, 2 * 2 + 1]
    assert torch.equal(unfold(folded), volume)


def test_a_frustum_is_read_at_the_right_bin():
    bins, side = 6, 4
    volume = torch.rand(1, 2, bins, side, side, generator=torch.Generator().manual_seed(0))
    for bin_number, row, column in ((0, 0, 0), (5, 3, 1), (2, 1, 3)):
        centre = torch.tensor(
            [
                (column + 0.5) / side * 2 - 1,
                (row + 0.5) / side * 2 - 1,
                ((bin_number + 0.5) / bins * 2 - 1) * DEPTH_REACH,
            ]
        )
        found = sample_frustum(volume, centre.view(1, 1, 3))[0, :, 0]
        torch.testing.assert_close(found, volume[0, :, bin_number, row, column])
        torch.testing.assert_close(
            sample_plane(volume[:, :, bin_number], centre.view(1, 1, 3))[0, :, 0],
            volume[0, :, bin_number, row, column],
        )


def test_outside_the_crop_there_is_no_hull():
    alpha = torch.ones(1, 1, 8, 8)
    seen = torch.tensor([[[0.0, 0.0, 0.0], [1.5, 0.0, 0.0]]])
    assert sample_plane(alpha, seen, outside="zeros")[0, 0].tolist() == [1.0, 0.0]


def test_cubes_go_x_slowest():
    cube = to_cube(voxel_centers(3).T[None])[0]
    assert cube.shape == (3, 3, 3, 3)
    torch.testing.assert_close(cube[:, 2, 0, 1], torch.tensor([1 / 3, -1 / 3, 0.0]))
