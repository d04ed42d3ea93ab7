"""What nobody sees of an object is left out, and nobody misses it."""

import numpy as np
import pytest
import torch

from diff2to3.gaussians.render import EPS2D, render
from diff2to3.kernels.rasterize import rasterize
from diff2to3.pipeline.prune import NUM_VIEWS, SIZE, shown, without_hidden
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, sample_cameras

pytestmark = pytest.mark.usefixtures("one_thread")


def cameras(count, size, seed):
    return sample_cameras(CameraConfig("sphere", num_views=count), size, size, np.random.default_rng(seed))


def ball(radius, count, seed, opacity=0.99):
    """Small Gaussians on a sphere."""
    g = torch.Generator().manual_seed(seed)
    means = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=1) * radius
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(count, 1)
    opacities = opacity * torch.ones(count)
    return Gaussians(
        means, quats, torch.full((count, 3), 0.04), opacities, torch.rand(count, 1, 3, generator=g)
    )


def test_against_colours_that_are_one_for_one_gaussian_each():
    """The picture in such a colour is its weight; all weights of a pixel are its alpha."""
    g = ball(0.3, 20, 0, torch.rand(20, generator=torch.Generator().manual_seed(1)))
    views = cameras(NUM_VIEWS, SIZE, 0)
    options = {"colors": torch.eye(20), "eps2d": EPS2D, "antialiased": True}
    drawn = rasterize(g.means, g.quats, g.scales, g.opacities, *views, SIZE, SIZE, **options)
    with torch.inference_mode():
        pixels = shown(Gaussians.cat([g]))
    torch.testing.assert_close(pixels.clone(), drawn.colors.sum((0, 1, 2)), rtol=1e-4, atol=1e-3)
    assert pixels.sum().item() == pytest.approx(drawn.alphas.sum().item(), rel=1e-4)


def test_what_is_inside_goes_and_is_not_missed():
    inside, outside = ball(0.2, 100, 0), ball(0.4, 4000, 1)
    whole = Gaussians.cat([inside, outside])
    kept = without_hidden(whole, 0.2)
    assert 3000 < len(kept) <= 4000 and kept.means.norm(dim=1).min() > 0.39
    before, after = (render(g, *cameras(5, 64, 7), 64, 64, background=1.0).colors for g in (whole, kept))
    assert (before - after).abs().max() < 0.03
    assert torch.equal(whole.chosen(torch.arange(100)).sh, inside.sh)
    assert without_hidden(whole, 1e9) is whole
