"""gsplat as a peer on a CPU: its PyTorch reference, pieced together from its public functions.

gsplat's reference of blending wants a CUDA kernel to list which Gaussian touches which pixel, and nerfacc (CUDA only)
for two scans along the pixels. Both are done here in PyTorch; projection, spherical harmonics and compositing are
gsplat's own. On a CUDA device its kernels run instead (``gsplat.rasterization``).
"""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor


def transmittance_before(alphas: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Π (1 - alpha) over the earlier entries of the same ray; entries are sorted by ray. [M]"""
    logs = torch.log1p(-alphas.double())
    running = logs.cumsum(0) - logs
    counts = torch.bincount(ray_indices, minlength=n_rays)
    starts = counts.cumsum(0) - counts
    return (running - running[starts[ray_indices]]).exp().to(alphas.dtype)


def render_weight_from_alpha(alphas: Tensor, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
    before = transmittance_before(alphas, ray_indices, n_rays)
    return alphas * before, before


def accumulate_along_rays(weights: Tensor, values: Tensor | None, ray_indices: Tensor, n_rays: int) -> Tensor:
    source = weights[:, None] if values is None else weights[:, None] * values
    return source.new_zeros(n_rays, source.shape[1]).index_add(0, ray_indices, source)


def touched_pixels(
    means2d: Tensor, radii: Tensor, depths: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """Gaussian and pixel of every pair in the Gaussians' bounding boxes, by pixel and then by depth."""
    low = (means2d - radii - 0.5).ceil().long()
    high = (means2d + radii - 0.5).floor().long()
    limits = torch.tensor([width - 1, height - 1])
    low, high = low.clamp_min(0), torch.minimum(high, limits)
    size = (high - low + 1).clamp_min(0) * (radii > 0)
    counts = size.prod(-1)
    gaussians = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(len(gaussians)) - (counts.cumsum(0) - counts)[gaussians]
    x = low[gaussians, 0] + within % size[gaussians, 0]
    y = low[gaussians, 1] + within // size[gaussians, 0]
    rank = torch.empty_like(counts)
    rank[depths.argsort()] = torch.arange(len(counts))
    order = ((y * width + x) * len(counts) + rank[gaussians]).argsort()
    return gaussians[order], (y * width + x)[order]


def gsplat_reference(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, sh: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Colours [1, H, W, 3] and alphas [1, H, W, 1] of one view."""
    stand_in = types.ModuleType("nerfacc")
    stand_in.accumulate_along_rays = accumulate_along_rays  # type: ignore[attr-defined]
    stand_in.render_weight_from_alpha = render_weight_from_alpha  # type: ignore[attr-defined]
    sys.modules["nerfacc"] = stand_in
    from gsplat.cuda import _torch_impl as impl

    from_covariance = getattr(impl, "_quat_scale_to_covar_preci", None)
    if from_covariance is None:
        from gsplat.cuda._math import _quat_scale_to_covar_preci as from_covariance
    covars, _ = from_covariance(quats, scales, True, False, triu=False)
    radii, means2d, depths, conics, _ = impl._fully_fused_projection(
        means, covars, viewmats, Ks, width, height
    )
    campos = torch.inverse(viewmats)[:, :3, 3]
    degree = {1: 0, 4: 1, 9: 2, 16: 3}[sh.shape[1]]
    colors = (impl._spherical_harmonics(degree, means - campos, sh) + 0.5).clamp_min(0)
    with torch.no_grad():
        gaussians, pixels = touched_pixels(means2d[0], radii[0], depths[0], width, height)
        dx = pixels % width + 0.5 - means2d[0, gaussians, 0]
        dy = pixels // width + 0.5 - means2d[0, gaussians, 1]
        a, b, c = conics[0, gaussians].unbind(-1)
        alphas = opacities[gaussians] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        counted = alphas >= 1 / 255
        gaussians, pixels = gaussians[counted], pixels[counted]
    view = torch.zeros_like(pixels)
    return impl.accumulate(
        means2d, conics, opacities[None], colors[None], gaussians, pixels, view, width, height
    )  # type: ignore[no-any-return]
