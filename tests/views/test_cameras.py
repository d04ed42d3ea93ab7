"""Camera sets: conventions, the published distributions, and that seeds decide everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diff2to3.views import CAMERA_SETS, CameraConfig, generator_for, intrinsics, look_at, sample_cameras
from diff2to3.views.cameras import BOUNDING_RADIUS


def eyes_of(viewmats: torch.Tensor) -> np.ndarray:
    m = viewmats.double().numpy()
    return -np.einsum("vji,vj->vi", m[:, :3, :3], m[:, :3, 3])


@given(st.tuples(*[st.floats(-3, 3)] * 3).filter(lambda e: sum(x * x for x in e) > 0.01))
def test_look_at(eye):
    (m,) = look_at([eye]).double().numpy()
    np.testing.assert_allclose(m[:3, :3] @ m[:3, :3].T, np.eye(3), atol=1e-6)
    assert np.linalg.det(m[:3, :3]) > 0.99
    np.testing.assert_allclose(m @ [0, 0, 0, 1], [0, 0, np.linalg.norm(eye), 1], atol=1e-5)
    np.testing.assert_allclose(m @ [*eye, 1], [0, 0, 0, 1], atol=1e-5)
    up = m[:3, :3] @ [0, 0, 1]
    assert up[1] <= 1e-6  # the world's up is not down in the image (y points down)
    assert abs(up[0]) < 1e-5  # and not tilted


def test_look_at_from_the_pole_and_from_the_target():
    m = look_at([[0, 0, 2]])[0].numpy()
    np.testing.assert_allclose(m[:3, :3] @ [0, 1, 0], [0, -1, 0], atol=1e-6)
    with pytest.raises(ValueError, match="eyes"):
        look_at([[0, 0, 0]])


def test_intrinsics_put_the_field_of_view_at_the_border():
    K = intrinsics(np.radians(60), 200, 100)[0].numpy()
    corner = K @ [0, np.tan(np.radians(30)), 1]
    np.testing.assert_allclose(corner, [100, 100, 1], rtol=1e-5)  # lower edge of the shorter side, centred


def test_reconstruction_set():
    config = CAMERA_SETS["reconstruction"]
    viewmats, Ks = sample_cameras(config, 512, 512, np.random.default_rng(0))
    eyes = eyes_of(viewmats)
    assert viewmats.shape == (150, 4, 4) and Ks.shape == (150, 3, 3)
    np.testing.assert_allclose(np.linalg.norm(eyes, axis=1), 2, rtol=1e-5)
    np.testing.assert_allclose(Ks[:, 0, 0], 256 / np.tan(np.radians(20)), rtol=1e-5)
    below = (eyes[:, 2] < 0).mean()
    assert abs(below - 0.25) < 0.02  # a quarter below the horizon, as published
    for lower, part in ((True, eyes[eyes[:, 2] < 0]), (False, eyes[eyes[:, 2] >= 0])):
        heights = np.sort(np.abs(part[:, 2]) / 2)  # even in area on each side
        assert np.abs(heights - (np.arange(len(part)) + 0.5) / len(part)).max() < 0.05, lower
    azimuth = np.sort(np.mod(np.arctan2(eyes[:, 1], eyes[:, 0]), 2 * np.pi)) / (2 * np.pi)
    assert np.abs(azimuth - (np.arange(150) + 0.5) / 150).max() < 0.03


def test_conditioning_set_fits_the_bounding_sphere():
    config = CameraConfig("fitted", num_views=4000)
    viewmats, Ks = sample_cameras(config, 256, 256, np.random.default_rng(1))
    radius = np.linalg.norm(eyes_of(viewmats), axis=1)
    fov = 2 * np.arctan(128 / Ks[:, 0, 0].double().numpy())
    np.testing.assert_allclose(np.sin(fov / 2) * radius, BOUNDING_RADIUS, rtol=1e-5)
    degrees = np.degrees(fov)
    assert 10 <= degrees.min() < 11 and 69 < degrees.max() <= 70
    k = np.sort(1 / radius**2)
    uniform = (k - k[0]) / (k[-1] - k[0])
    assert np.abs(uniform - np.arange(4000) / 4000).max() < 0.04  # 1/radius² is uniform


def test_orbit_and_elevation_range():
    viewmats, _ = sample_cameras(
        CameraConfig("orbit", num_views=4, elevation=30), 8, 8, np.random.default_rng(0)
    )
    eyes = eyes_of(viewmats)
    np.testing.assert_allclose(eyes[:, 2], 1, atol=1e-6)
    np.testing.assert_allclose(eyes[0], [np.sqrt(3), 0, 1], atol=1e-6)
    np.testing.assert_allclose(eyes[1], [0, np.sqrt(3), 1], atol=1e-6)
    config = CameraConfig("sphere", num_views=50, elevation_range=(0, 30), radius=1.0)
    heights = eyes_of(sample_cameras(config, 8, 8, np.random.default_rng(0))[0])[:, 2]
    assert 0 <= heights.min() and heights.max() <= 0.5 + 1e-6 and heights.max() > 0.48


def test_seeds():
    config = CameraConfig(num_views=5)

    def draw(*key) -> torch.Tensor:
        return sample_cameras(config, 64, 64, generator_for(*key))[0]

    assert torch.equal(draw(0, "a", "recon"), draw(0, "a", "recon"))
    for other in ((1, "a", "recon"), (0, "b", "recon"), (0, "a", "cond"), (0, "arecon")):
        assert not torch.equal(draw(0, "a", "recon"), draw(*other))


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "spiral"},
        {"num_views": 0},
        {"radius": 0},
        {"fov_degrees": 180},
        {"fov_range": (50, 40)},
        {"elevation_range": (-100, 0)},
        {"lower_fraction": 2},
    ],
)
def test_bad_settings_name_the_field(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CameraConfig(**bad)
