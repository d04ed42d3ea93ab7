"""Which Gaussians pictures show, and how much of each."""

from __future__ import annotations

import torch
from torch import Tensor

from diff2to3.gaussians.render import EPS2D
from diff2to3.kernels.rasterize import rasterize
from diff2to3.types import Gaussians


def shown(gaussians: Gaussians, viewmats: Tensor, Ks: Tensor, width: int, height: int) -> Tensor:
    """How many pixels each Gaussian fills over V views, [G]: the sum of its weights in blending, Σ T α.

    A view at a time, so that memory does not grow with their number. Args as of
    :func:`diff2to3.gaussians.render.render`. Works where gradients are off, too: a colour's gradient is its weight.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # clones, for what inference mode made takes no part in autograd
        parts = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities)
        means, quats, scales, opacities = (part.detach().clone() for part in parts)
        colors = torch.ones_like(opacities)[:, None].requires_grad_()
        total = torch.zeros_like(opacities)
        for viewmat, K in zip(viewmats.clone(), Ks.clone(), strict=True):
            drawn = rasterize(
                means,
                quats,
                scales,
                opacities,
                viewmat[None].to(colors),
                K[None].to(colors),
                width,
                height,
                colors=colors,
                eps2d=EPS2D,
                antialiased=True,
            )
            (weights,) = torch.autograd.grad(drawn.colors.sum(), colors)
            total += weights[:, 0]
    return total
