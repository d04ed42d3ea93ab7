"""What a photo says about voxels, against loops over voxels and pixels written out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.voxels.lift_photo import GEOMETRY_CHANNELS, in_crop, lift_photo, visibility

CAMERA = PhotoCamera(elevation=25.0, focal=1.6)
R = 12


def by_hand(point: np.ndarray, camera: PhotoCamera) -> tuple[float, float, float]:
    """Where a point is in the crop, and its depth: the camera stands at -y and looks down by its elevation."""
    e = math.radians(camera.elevation)
    x, y, z = point
    depth = camera.focal + y * math.cos(e) - z * math.sin(e)
    up = z * math.cos(e) + y * math.sin(e)
    return 0.5 + camera.focal * x / depth, 0.5 - camera.focal * up / depth, depth


def bilinear(image: np.ndarray, u: float, v: float) -> np.ndarray:
    """An image [C, h, w] at u, v in [0, 1], by its four pixels."""
    _, h, w = image.shape
    x, y = min(max(u * w - 0.5, 0), w - 1), min(max(v * h - 0.5, 0), h - 1)
    x0, y0 = int(x), int(y)
    x1, y1, fx, fy = min(x0 + 1, w - 1), min(y0 + 1, h - 1), x - x0, y - y0
    top = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
    return top * (1 - fy) + (image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx) * fy


def shell(resolution: int = R) -> Tensor:
    """Cells that a sphere of radius 0.4 crosses."""
    axis = (torch.arange(resolution) + 0.5) / resolution - 0.5
    radius = torch.cartesian_prod(axis, axis, axis).norm(dim=1)
    cells = torch.cartesian_prod(*(torch.arange(resolution),) * 3)
    return cells[(radius - 0.4).abs() < 0.6 / resolution]


def photo(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(5, 8, 8, generator=generator), torch.randn(2, 4, 4, generator=generator)]
    return maps, torch.rand(16, 16, generator=generator), torch.rand(16, 16, 3, generator=generator)


@pytest.mark.parametrize("camera", [CAMERA, PhotoCamera(-8.0, 5.0), PhotoCamera(60.0, 1.0)])
def test_features_are_those_of_a_loop_over_voxels(camera: PhotoCamera) -> None:
    coords, (maps, alpha, rgb) = shell(), photo()
    lifted = lift_photo(maps, alpha, rgb, camera, coords, R)
    assert lifted.shape == (len(coords), GEOMETRY_CHANNELS + 7) and lifted.dtype == torch.float32
    picture = ((rgb - 0.5) * alpha[..., None] * 2).permute(2, 0, 1).double().numpy()
    for row, cell in zip(lifted.numpy(), coords.numpy(), strict=True):
        u, v, depth = by_hand((cell + 0.5) / R - 0.5, camera)
        np.testing.assert_allclose(row[:3], bilinear(picture, u, v), atol=1e-4)
        np.testing.assert_allclose(row[3], bilinear(alpha[None].double().numpy(), u, v)[0], atol=1e-4)
        np.testing.assert_allclose(row[5], 2 * (depth - camera.focal), atol=1e-4)
        assert row[7] == 1
        expected = np.concatenate([bilinear(m.double().numpy(), u, v) for m in maps])
        np.testing.assert_allclose(row[GEOMETRY_CHANNELS:], expected, atol=1e-4)


def test_visibility_is_that_of_a_loop_over_points() -> None:
    coords = shell()
    visible, behind = visibility(coords, CAMERA, R)
    seen: dict[tuple[int, int], float] = {}
    points = []
    for cell in coords.numpy():
        own = []
        for offset in np.ndindex(3, 3, 3):
            u, v, depth = by_hand((cell + (np.array(offset) + 0.5) / 3) / R - 0.5, CAMERA)
            key = (int(u * R), int(v * R))
            own.append((key, depth))
            seen[key] = min(seen.get(key, np.inf), depth)
        points.append(own)
    past = np.array([[depth - seen[key] for key, depth in own] for own in points])
    # a point on the border between two cells may fall into either in float32
    assert (np.abs((past <= 2 / R).mean(1) - visible.numpy()) < 0.1).mean() > 0.98
    np.testing.assert_allclose(np.maximum(past.mean(1) - 2 / R, 0), behind.numpy(), atol=0.02)


def test_of_a_sphere_the_near_side_is_seen() -> None:
    coords = shell(24)
    visible, behind = visibility(coords, CAMERA, 24)
    centres = (coords.float() + 0.5) / 24 - 0.5
    towards = torch.tensor(CAMERA.eye)
    cosine = torch.nn.functional.cosine_similarity(centres, towards - centres)
    # cells of the z-buffer are as wide as voxels: here and there one holds points of a voxel well in front
    assert visible[cosine > 0.45].mean() > 0.9 and (visible[cosine > 0.6] > 0.7).float().mean() > 0.98
    assert behind[cosine > 0.45].max() < 0.02
    assert visible[cosine < -0.6].max() == 0 and behind[cosine < -0.6].min() > 0.2


def test_one_voxel_alone_is_seen_even_outside_the_crop() -> None:
    for cell in ([0, 0, 0], [R - 1, 0, R - 1], [5, 5, 5]):
        visible, behind = visibility(torch.tensor([cell]), PhotoCamera(0.0, 0.6), R)
        assert visible.item() == 1 and behind.item() == 0


def test_a_map_alone_needs_no_list_and_the_frame_is_that_of_the_camera() -> None:
    coords, (maps, alpha, rgb) = shell(), photo(1)
    one = lift_photo(maps[0], alpha, rgb, CAMERA, coords, R)
    assert torch.equal(one, lift_photo(maps[:1], alpha, rgb, CAMERA, coords, R))
    place, depth = in_crop(torch.zeros(1, 3), CAMERA)
    assert torch.allclose(place, torch.tensor([[0.5, 0.5]])) and depth.item() == pytest.approx(CAMERA.focal)


def test_wrong_shapes_are_named() -> None:
    maps, alpha, rgb = photo()
    with pytest.raises(ValueError, match=r"coords: expected shape \[N, 3\], got \[4, 4\]"):
        lift_photo(maps, alpha, rgb, CAMERA, torch.zeros(4, 4), R)
    with pytest.raises(ValueError, match="maps: expected"):
        lift_photo(maps[0][None], alpha, rgb, CAMERA, shell(), R)
    with pytest.raises(ValueError, match="alpha, rgb: expected"):
        lift_photo(maps, alpha[:4], rgb, CAMERA, shell(), R)
