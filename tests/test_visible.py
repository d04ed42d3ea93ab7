"""How much pictures show of each Gaussian: against one-hot colours, and as a way to drop what nobody sees."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diff2to3.gaussians.combine import chosen
from diff2to3.gaussians.render import EPS2D, render
from diff2to3.gaussians.visible import shown
from diff2to3.kernels.rasterize import rasterize
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, sample_cameras

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cameras():
    return sample_cameras(CameraConfig("sphere", num_views=5), 32, 32, np.random.default_rng(0))


def ball(radius, count, seed):
    """Small opaque Gaussians on a sphere."""
    g = torch.Generator().manual_seed(seed)
    means = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=1) * radius
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(count, 1)
    scales, opacities = torch.full((count, 3), 0.04), torch.full((count,), 0.99)
    return Gaussians(means, quats, scales, opacities, torch.rand(count, 1, 3, generator=g))


def test_against_colours_that_are_one_for_one_gaussian_each(cameras):
    """The picture in such a colour is its weight; all weights of a pixel are its alpha."""
    gaussians = ball(0.3, 20, 0)
    gaussians = replace(gaussians, opacities=torch.rand(20, generator=torch.Generator().manual_seed(1)))
    parts = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities)
    options = {"colors": torch.eye(20), "eps2d": EPS2D, "antialiased": True, "backend": "reference"}
    drawn = rasterize(*parts, *cameras, 32, 32, **options)
    with torch.inference_mode():
        pixels = shown(gaussians, *cameras, 32, 32)
    assert not pixels.is_inference() and not pixels.requires_grad
    torch.testing.assert_close(pixels, drawn.colors.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)
    assert pixels.sum().item() == pytest.approx(drawn.alphas.sum().item(), rel=1e-4)


def test_what_is_inside_is_not_shown_and_not_missed(cameras):
    inside, outside = ball(0.2, 100, 0), ball(0.4, 1500, 1)
    whole = Gaussians.cat([inside, outside])
    pixels = shown(whole, *cameras, 32, 32)
    assert pixels[:100].max() < 1e-2 < 0.5 < pixels[100:].mean()
    kept = chosen(whole, pixels >= 1e-2)
    assert 100 < len(kept) <= 1500
    before, after = (render(g, *cameras, 32, 32, background=1.0).colors for g in (whole, kept))
    assert (before - after).abs().max() < 0.02
    assert torch.equal(chosen(whole, torch.arange(100)).sh, inside.sh)
