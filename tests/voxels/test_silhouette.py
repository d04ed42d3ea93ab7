"""Voxels that fill the photo's silhouette, against loops over rays."""

import math

import numpy as np
import pytest
import torch

from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.voxels.silhouette import covered, fit_silhouette

R = 12
CAMERA = PhotoCamera(20.0, 2.5)


def cell_of(point: np.ndarray) -> tuple[int, int]:
    """Column and row of the R x R cells that a point projects into, written out by hand."""
    e = math.radians(CAMERA.elevation)
    x, y, z = point
    depth = CAMERA.focal + y * math.cos(e) - z * math.sin(e)
    up = z * math.cos(e) + y * math.sin(e)
    return math.floor((0.5 + CAMERA.focal * x / depth) * R), math.floor((0.5 - CAMERA.focal * up / depth) * R)


def disc(radius: float = 0.35, size: int = 4 * R) -> torch.Tensor:
    axis = (torch.arange(size) + 0.5) / size - 0.5
    return ((axis[:, None] ** 2 + axis[None] ** 2).sqrt() < radius).float()


def cover_by_hand(grid: np.ndarray) -> np.ndarray:
    found = np.zeros((R, R), bool)
    for cell in np.argwhere(grid):
        for offset in np.ndindex(3, 3, 3):
            column, row = cell_of((cell + (np.array(offset) + 0.5) / 3) / R - 0.5)
            if 0 <= column < R and 0 <= row < R:
                found[row, column] = True
    return found


def test_cover_is_that_of_a_loop_over_points() -> None:
    grid = np.random.default_rng(0).random((R, R, R)) < 0.01
    found = covered(torch.from_numpy(np.argwhere(grid)), CAMERA, R).view(R, R).numpy()
    assert (found != cover_by_hand(grid)).mean() < 0.01  # points on a border between cells


def test_holes_are_filled_by_the_likeliest_voxel_of_their_rays() -> None:
    logits = torch.full((R, R, R), -4.0)
    logits[:, 3, :] = -1.0  # a plate that the threshold misses altogether
    alpha = disc()
    grid = fit_silhouette(logits, alpha, CAMERA).numpy()
    cells = torch.nn.functional.avg_pool2d(alpha[None, None], 4)[0, 0].numpy()
    seen = cover_by_hand(grid)
    assert seen[cells > 0.5].mean() > 0.95
    assert set(np.argwhere(grid)[:, 1]) <= {2, 3, 4}


def test_what_is_beside_the_silhouette_goes_and_what_is_in_it_stays() -> None:
    logits = torch.full((R, R, R), 3.0)
    grid = fit_silhouette(logits, disc(), CAMERA).numpy()
    for cell in np.ndindex(R, R, R):
        column, row = cell_of((np.array(cell) + 0.5) / R - 0.5)
        distance = math.hypot((column + 0.5) / R - 0.5, (row + 0.5) / R - 0.5)
        if 0 <= column < R and 0 <= row < R and distance < 0.28:
            assert grid[cell]
        if 0 <= column < R and 0 <= row < R and distance > 0.35 + 2.2 / R:
            assert not grid[cell]


def test_voxels_that_fit_are_left_as_they_are() -> None:
    axis = (torch.arange(R) + 0.5) / R - 0.5
    ball = torch.cartesian_prod(axis, axis, axis).norm(dim=1).view(R, R, R) < 0.38
    logits = torch.where(ball, 5.0, -5.0)
    changed = (fit_silhouette(logits, disc(0.36), CAMERA) != ball).float().sum() / ball.sum()
    assert float(changed) < 0.05


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="logits: expected"):
        fit_silhouette(torch.zeros(4, 4, 3), disc(), CAMERA)
    with pytest.raises(ValueError, match="alpha: expected"):
        fit_silhouette(torch.zeros(R, R, R), torch.ones(R - 1, R - 1), CAMERA)


def test_nothing_lies_beside_the_crop_unless_the_object_goes_on_there() -> None:
    """A near camera sees only the middle of the cube; a whole object has no voxels that its photo would not show."""
    near = PhotoCamera(0.0, 1.0)
    logits = torch.full((R, R, R), 3.0)
    axis = (np.arange(R) + 0.5) / R - 0.5
    x, y, _ = np.meshgrid(axis, axis, axis, indexing="ij")
    beside = np.abs(x / (1 + y)) > 0.5
    assert beside.sum() > 50
    assert not fit_silhouette(logits, disc(), near).numpy()[beside].any()
    cut = disc()
    cut[:, -1] = 1.0
    assert fit_silhouette(logits, cut, near).numpy()[beside].all()
