"""The photo frame against projections written out by hand."""

import numpy as np
import pytest
import torch

from diff2to3.views.photo_frame import (
    SILHOUETTE,
    SURFACE_DEPTH,
    PhotoCamera,
    moved_viewmats,
    photograph,
    transformed,
)


def box(extents):
    corners = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij"), -1).reshape(-1, 3) / 2
    return corners * np.asarray(extents)


def pixels(points, viewmat, K):
    seen = points @ viewmat[:3, :3].double().numpy().T + viewmat[:3, 3].double().numpy()
    image = seen @ K.double().numpy().T
    return image[:, :2] / image[:, 2:], seen[:, 2]


@pytest.mark.parametrize("azimuth", [0.0, 100.0, 271.0])
@pytest.mark.parametrize("elevation", [-8.0, 0.0, 55.0])
@pytest.mark.parametrize("focal", [1.0, 5.0])
def test_a_photograph_shows_the_same_picture_in_both_frames(azimuth, elevation, focal):
    points = np.add(box([1.0, 0.6, 0.3]), [0.1, -0.05, 0.02])
    shot = photograph(points, azimuth, elevation, focal)
    K = shot.camera.K(256)
    own, _ = pixels(points, shot.viewmat, K)
    framed, depth = pixels(transformed(points, shot.transform), shot.camera.viewmat, K)
    np.testing.assert_allclose(own, framed, atol=2e-3)
    sides = own.max(0) - own.min(0)
    assert sides.max() == pytest.approx(SILHOUETTE * 256, abs=0.5)
    np.testing.assert_allclose((own.max(0) + own.min(0)) / 2, 128, atol=0.3)
    assert depth.min() > 0
    # up stays up, and the camera looks along +y from a distance of one focal length
    assert np.allclose(shot.transform[2, :2], 0) and np.allclose(shot.transform[:2, 2], 0)
    assert shot.camera.eye[0] == 0 and shot.camera.eye[1] < 0
    assert np.linalg.norm(shot.camera.eye) == pytest.approx(focal)


def test_the_crop_is_one_unit_wide_at_the_origin():
    camera = PhotoCamera(30.0, 2.5)
    right = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64).numpy()
    at, depth = pixels(right, camera.viewmat, camera.K(100))
    np.testing.assert_allclose(at, [[100, 50], [0, 50], [50, 50]], atol=1e-3)
    np.testing.assert_allclose(depth, 2.5, atol=1e-5)


def test_other_cameras_move_along():
    points = box([0.4, 1.0, 0.8])
    shot = photograph(points, 40.0, 20.0, 2.0)
    viewmats, scale = moved_viewmats(shot.viewmat[None], shot.transform)
    assert scale == pytest.approx(shot.scale)
    rotation = viewmats[0, :3, :3].double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(viewmats[0], shot.camera.viewmat, atol=1e-4)
    _, before = pixels(points, shot.viewmat, shot.camera.K(64))
    _, after = pixels(transformed(points, shot.transform), viewmats[0], shot.camera.K(64))
    np.testing.assert_allclose(after, before * scale, rtol=1e-4)


def test_bad_cameras_are_refused():
    with pytest.raises(ValueError, match="focal"):
        PhotoCamera(0.0, 0.4)
    with pytest.raises(ValueError, match="elevation"):
        PhotoCamera(90.0, 2.0)
    with pytest.raises(ValueError, match="vertices"):
        photograph(np.zeros((0, 3)), 0, 0, 2.0)


def test_the_visible_surface_has_its_depth_whatever_is_behind_it():
    points = box([0.4, 1.0, 0.8])
    shot = photograph(points, 40.0, 20.0, 2.0)
    depths = np.array([[0.0, 1.2], [1.5, 1.8]]) / shot.scale  # of three pixels, in the object frame
    placed = shot.placed(depths)
    eye = np.array(shot.camera.eye)
    seen = np.linalg.inv(shot.transform) @ [
        *(eye + (0 - eye) * 0.75),
        1.0,
    ]  # a point 1.5 units from the camera
    moved = transformed(seen[None, :3], placed.transform)[0]
    # the mean of 1.2, 1.5 and 1.8 is where the frame wants it: 0.15 in front of the origin, on the same ray
    np.testing.assert_allclose(moved, eye * SURFACE_DEPTH / 2.0, atol=1e-6)
    K = shot.camera.K(64)
    before, _ = pixels(points, shot.viewmat, K)
    after, _ = pixels(transformed(points, placed.transform), placed.camera.viewmat, K)
    np.testing.assert_allclose(before, after, atol=2e-3)
    with pytest.raises(ValueError, match="nothing is seen"):
        shot.placed(np.zeros((2, 2)))
