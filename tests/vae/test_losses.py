"""The losses of the 2to3-VAE against the metrics, float64 and formulas by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diff2to3.data.pictures import shrink
from diff2to3.metrics.image import ssim as reference_ssim
from diff2to3.training.tasks.vae_objective import dissimilarity
from diff2to3.types import Gaussians, Views
from diff2to3.vae import losses


def pictures(
    v: int = 3, h: int = 24, w: int = 31, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(v, h, w, 3, generator=generator, dtype=torch.float64)
    b = (0.7 * a + 0.3 * torch.rand(v, h, w, 3, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return a.to(dtype), b.to(dtype)


def test_ssim_is_the_metric_and_differentiable() -> None:
    images, targets = pictures()
    assert torch.allclose(losses.ssim(images, targets).double(), reference_ssim(images, targets), atol=1e-5)
    a, b = pictures(1, 12, 13, torch.float64)
    assert torch.allclose(losses.ssim(a, b), reference_ssim(a, b), atol=1e-12)
    a = a[:, :6, :5].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.ssim(x, b[:, :6, :5]), a)


def some_gaussians(count: int, dtype: torch.dtype = torch.float64) -> Gaussians:
    generator = torch.Generator().manual_seed(4)
    means, quats = (torch.rand(count, n, generator=generator, dtype=dtype) for n in (3, 4))
    opacities = torch.rand(count, generator=generator, dtype=dtype)
    return Gaussians(means / 10, quats, means, opacities, means[:, None])


def test_surface_distances_against_all_pairs() -> None:
    gaussians, surface = some_gaussians(40), some_gaussians(60).means + 0.01
    value = losses.surface_distances(gaussians, surface, torch.Generator(), 120)
    pairs = (gaussians.means[:, None] - surface).norm(dim=2)
    to, back = pairs.amin(1), pairs[gaussians.opacities >= 0.5].amin(0)
    share = [d**2 / (d**2 + losses.REACH**2) for d in (to, back)]
    precise = (share[0] * gaussians.opacities).mean()
    assert float(value) == pytest.approx(float(precise + share[1].mean()) / 2, rel=1e-9)

    def loss(means: Tensor, opacities: Tensor) -> Tensor:
        moved = replace(gaussians, means=means, opacities=opacities)
        return losses.surface_distances(moved, surface, torch.Generator().manual_seed(0), 30)

    inputs = gaussians.means.requires_grad_(), gaussians.opacities.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-8, atol=1e-4)


def test_surface_distances_where_nothing_is_solid_or_all_is_right() -> None:
    gaussians = some_gaussians(40)
    surface = gaussians.means
    on_it = losses.surface_distances(
        replace(gaussians, opacities=torch.ones(40).double()), surface, torch.Generator()
    )
    assert float(on_it) < 1e-12
    faint = replace(gaussians, opacities=torch.full((40,), 0.4).double())
    assert float(losses.surface_distances(faint, surface, torch.Generator())) == pytest.approx(0.5)


def test_pixel_losses_by_hand() -> None:
    images, targets = pictures(2, 8, 8)
    difference = (images - targets).double()
    for b in range(2):
        assert float(losses.l1(images, targets)[b]) == pytest.approx(
            float(difference[b].abs().mean()), rel=1e-5
        )
        assert float(losses.l2(images, targets)[b]) == pytest.approx(
            float(difference[b].pow(2).mean()), rel=1e-5
        )
    half = difference.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))
    quarter = half.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4))
    expected = sum(x.diff(dim=d).abs().mean((1, 2, 3)) for x in (difference, half, quarter) for d in (1, 2))
    assert torch.allclose(losses.edges(images, targets).double(), expected, rtol=1e-5)
    assert float(losses.edges(images, images).abs().max()) == 0


def test_cropping_to_the_object_changes_nothing() -> None:
    images, targets = pictures(2, 64, 64)
    alphas = torch.zeros(2, 64, 64)
    alphas[0, 20:30, 25:40] = 1
    alphas[1, 28:35, 24:30] = 0.5
    inside = alphas.amax(0)[None, ..., None].bool()
    images = torch.where(inside, images, 0.3)
    targets = torch.where(inside, targets, 0.3)
    whole = 1 - losses.ssim(images, targets).mean()
    assert float(dissimilarity(images, targets, alphas)) == pytest.approx(float(whole), rel=1e-4)
    empty = torch.zeros_like(alphas)
    assert float(dissimilarity(images, targets, empty)) == pytest.approx(float(whole), rel=1e-5)


def test_regularisers_and_kl_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    scales, opacities = torch.rand(5, 3, generator=generator), torch.rand(5, generator=generator)
    g = Gaussians(torch.zeros(5, 3), torch.zeros(5, 4), scales, opacities, torch.zeros(5, 1, 3))
    assert float(losses.volume(g)) == pytest.approx(
        sum(math.prod(row) for row in scales.tolist()) / 5, rel=1e-5
    )
    assert float(losses.transparency(g)) == pytest.approx(
        sum((o - 1) ** 2 for o in opacities.tolist()) / 5, rel=1e-5
    )
    mean, logvar = torch.randn(7, 4, generator=generator), torch.randn(7, 4, generator=generator)
    kl = losses.kl_by_item(mean, logvar, torch.tensor([0, 3, 7], dtype=torch.int32))
    prior = torch.distributions.Normal(0.0, 1.0)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()), prior)
    assert torch.allclose(kl, torch.stack([exact[:3].mean(), exact[3:].mean()]), rtol=1e-5)


def test_shrinking_views_averages_premultiplied_colour_and_scales_cameras() -> None:
    generator = torch.Generator().manual_seed(3)
    images, alphas = torch.rand(1, 8, 8, 3, generator=generator), torch.rand(1, 8, 8, generator=generator)
    K = torch.tensor([[[10.0, 0, 4], [0, 12, 4], [0, 0, 1]]])
    views = Views(images, alphas, torch.eye(4)[None], K)
    small = shrink(views, 4)
    cell = (images[0, 2:4, 4:6] * alphas[0, 2:4, 4:6, None]).mean((0, 1))
    assert torch.allclose(small.images[0, 1, 2] * small.alphas[0, 1, 2], cell, atol=1e-6)
    assert float(small.alphas[0, 1, 2]) == pytest.approx(float(alphas[0, 2:4, 4:6].mean()), rel=1e-5)
    assert small.Ks[0].tolist() == [[5, 0, 2], [0, 6, 2], [0, 0, 1]]
    with pytest.raises(ValueError, match="does not divide"):
        shrink(views, 3)
