"""Mirrored and superposed Gaussians, by what is seen of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diff2to3.gaussians.combine import mirrored, superposed
from diff2to3.gaussians.render import render
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, generator_for, sample_cameras

pytestmark = pytest.mark.usefixtures("one_thread")


def some(count, degree, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.rand(count, 3, generator=g, dtype=dtype) - 0.5,
        torch.randn(count, 4, generator=g, dtype=dtype),
        torch.rand(count, 3, generator=g, dtype=dtype) * 0.1 + 0.01,
        torch.rand(count, generator=g, dtype=dtype),
        torch.randn(count, (degree + 1) ** 2, 3, generator=g, dtype=dtype) * 0.3,
    )


def pictures(gaussians, viewmats, Ks):
    seen = render(gaussians, viewmats, Ks, 64, 64, background=1.0, backend="reference")
    return torch.cat([seen.colors, seen.alphas[..., None]], -1)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_mirrored_camera_sees_the_picture_flipped(degree):
    """x changes sign in the world and in the camera, whose centre is the picture's."""
    config = CameraConfig("sphere", num_views=3)
    viewmats, Ks = (x.double() for x in sample_cameras(config, 64, 64, generator_for(0, "mirror")))
    across = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    plain = some(20, degree)
    seen, other = pictures(plain, viewmats, Ks), pictures(mirrored(plain), across @ viewmats @ across, Ks)
    assert seen.std() > 0.1
    torch.testing.assert_close(other.flip(2), seen, rtol=0, atol=1e-9)
    assert not torch.allclose(pictures(plain, across @ viewmats @ across, Ks).flip(2), seen, atol=1e-2)


def test_mirrored_twice_is_the_same_rotation():
    plain = some(7, 3)
    twice = mirrored(mirrored(plain))
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.equal(getattr(twice, name), getattr(plain, name)), name


@given(st.integers(1, 5), st.integers(0, 100))
def test_equal_guesses_are_as_opaque_as_one(count, seed):
    plain = some(6, 1, seed)
    made = superposed([plain] * count)
    assert len(made) == 6 * count
    through = (1 - made.opacities).view(count, 6).prod(0)
    torch.testing.assert_close(through, 1 - plain.opacities, rtol=0, atol=1e-12)


def test_opaque_stays_opaque_and_what_only_one_believes_in_becomes_thinner():
    plain = some(2, 0, dtype=torch.float32)
    solid = replace(plain, opacities=torch.ones(2))
    none = replace(plain, opacities=torch.zeros(2))
    made = superposed([solid, none]).opacities
    assert bool(torch.isfinite(made).all()) and bool((made[:2] > 0.99).all()) and bool((made[2:] == 0).all())
    half = superposed([replace(plain, opacities=torch.full((2,), 0.75)), none]).opacities
    torch.testing.assert_close(half, torch.tensor([0.5, 0.5, 0.0, 0.0]))
