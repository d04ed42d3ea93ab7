"""What the 2to3-VAE is trained with (P3.3; TRELLIS, appendix A): image losses and regularisers, one number a view or
an object, so that a batch can be weighed by its caller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.nn.items import mean_by_item
from diff2to3.types import Gaussians
from diff2to3.vae.posterior import Posterior

WINDOW, SIGMA = 11, 1.5


#: Where the surface loss turns from quadratic to indifferent, in object units: an outlier counts as one, however far.
REACH = 0.02


def surface_distances(
    gaussians: Gaussians, surface: Tensor, generator: torch.Generator, count: int = 1024
) -> Tensor:
    """How far centres of Gaussians are from points on a surface [N, 3], and the other way: 0 to 1, differentiable.

    Mean over ``count`` Gaussians at random of opacity · d² / (d² + REACH²), d to the nearest point, so that one that is
    far away comes nearer or turns transparent; and over half as many points, d to the nearest Gaussian that is at least
    half opaque. Half the sum: smooth forms of what the F-score is made of. Not in the paper.
    """
    means, opacities = gaussians.means, gaussians.opacities
    with torch.no_grad():
        some = torch.randperm(len(means), generator=generator)[:count].to(means.device)
        wanted = surface[torch.randperm(len(surface), generator=generator)[: count // 2].to(surface.device)]
        solid = (opacities >= 0.5).nonzero()[:, 0]
        nearest_point = torch.cdist(means[some], surface).argmin(1)
        nearest = solid[torch.cdist(wanted, means[solid]).argmin(1)] if len(solid) else None
    precise = (opacities[some] * lost(means[some] - surface[nearest_point])).mean()
    if nearest is None:
        return (precise + 1) / 2
    return (precise + lost(means[nearest] - wanted).mean()) / 2


def lost(difference: Tensor) -> Tensor:
    """d² / (d² + REACH²) of vectors [N, 3]."""
    squared = difference.square().sum(1)
    return squared / (squared + REACH**2)


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of images [V, H, W, C]: [V]."""
    return (images - targets).abs().flatten(1).mean(1)


def l2(images: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference of images [V, H, W, C]: [V]."""
    return (images - targets).square().flatten(1).mean(1)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images [V, H, W, C] in [0, 1], mean over pixels: [V].

    Gaussian window of 11 with σ = 1.5 and zeros around the image, as TRELLIS and 3DGS train with. The same numbers
    as diff2to3.metrics.image.ssim, in the images' own precision and differentiable.
    """
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SIGMA**2))
    line = line / line.sum()
    v, h, w, c = images.shape
    x, y = (t.permute(0, 3, 1, 2) for t in (images, targets))
    moments = torch.cat([x, y, x * x, y * y, x * y], 1).reshape(-1, h, w)
    mean_x, mean_y, xx, yy, xy = blur(moments, line).reshape(v, 5, c, h, w).unbind(1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    variances = xx - mean_x.square() + yy - mean_y.square()
    structure = (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(1)


def blur(x: Tensor, line: Tensor) -> Tensor:
    """A separable filter over images [P, H, W], with zeros outside.

    As two products with banded matrices: for one channel a matrix product is several times faster than a
    convolution, and its gradient is another.
    """
    rows, columns = band(line, x.shape[1]), band(line, x.shape[2])
    return rows @ (x @ columns.T)


def band(line: Tensor, size: int) -> Tensor:
    """[size, size]: row i holds ``line`` centred on column i."""
    half = len(line) // 2
    index = torch.arange(size, device=line.device)
    distance = index[None, :] - index[:, None] + half
    inside = (distance >= 0) & (distance < len(line))
    return torch.where(inside, line[distance.clamp(0, len(line) - 1)], 0)


def edges(images: Tensor, targets: Tensor, num_levels: int = 3) -> Tensor:
    """L1 between the differences of neighbouring pixels, summed over halved sizes: [V].

    The stated substitute for LPIPS where its weights are not at hand: it weighs fine structure as L1 alone does not.
    """
    x, total = (images - targets).permute(0, 3, 1, 2), images.new_zeros(len(images))
    for level in range(num_levels):
        if level:
            x = F.avg_pool2d(x, 2)
        if min(x.shape[-2:]) < 2:
            break
        across, down = x.diff(dim=-1).abs(), x.diff(dim=-2).abs()
        total = total + across.flatten(1).mean(1) + down.flatten(1).mean(1)
    return total


def volume(gaussians: Gaussians) -> Tensor:
    """Mean of Π scales (TRELLIS weighs it by 1e4): a scalar."""
    return gaussians.scales.prod(1).mean()


def transparency(gaussians: Gaussians) -> Tensor:
    """Mean of (opacity - 1)² (TRELLIS weighs it by 1e-3): a scalar."""
    return (gaussians.opacities - 1).square().mean()


def kl_by_item(mean: Tensor, logvar: Tensor, cu_seqlens: Tensor) -> Tensor:
    """KL divergence to N(0, 1), mean over the voxels and channels of each batch item: [B]."""
    return mean_by_item(Posterior(mean, logvar).kl_terms(), cu_seqlens)
