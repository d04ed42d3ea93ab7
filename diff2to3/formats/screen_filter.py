"""Gaussians for viewers with another screen filter.

Models here are trained with 0.1 px² and opacities compensated for it (mip-splatting). Most viewers blur every Gaussian
by 0.3 px² and compensate nothing, so that thin Gaussians look fat and opaque there. No change of the Gaussians undoes
that at every distance, since pixels are not lengths; ``bake`` does so at the distance of a usual picture.
"""

from __future__ import annotations

from typing import Any

import torch

from diff2to3.types import Gaussians

#: Variance in px² that viewers without mip-splatting add.
VIEWER_FILTER = 0.3
#: A pixel at the object's centre, in the object's units: 512 pixels over 40° at distance 2, as the models are trained.
PIXEL = 2.0 / (256 / 0.36397023426620234)
#: Variances may become this small, in px².
SMALLEST = 1e-3


def bake(
    gaussians: Gaussians, screen_filter: float, pixel: float = PIXEL
) -> tuple[Gaussians, dict[str, Any]]:
    """Gaussians that look in a viewer with 0.3 px² as these do with ``screen_filter`` px² and compensation.

    Their variances lose the difference of the two filters. Each one's opacity is then chosen so that what it covers
    in all, opacity × area on the screen, stays the same, on the mean over the three views along its axes by the area
    that they show.

    Returns:
        the Gaussians, and what to add to the file's metadata
    """
    squares = (gaussians.scales.double() / pixel) ** 2  # px²
    thinner = (squares - (VIEWER_FILTER - screen_filter)).clamp_min(SMALLEST)
    ours = torch.stack([squares[:, i] * squares[:, j] for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    shown = thinner + VIEWER_FILTER
    theirs = torch.stack([shown[:, i] * shown[:, j] for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    # covered = opacity · √det of the variance without the filter: compensation cancels the filter's own area
    weight = theirs.sqrt()
    ratio = ours.sqrt().sum(1) / weight.sum(1)
    baked = Gaussians(
        gaussians.means,
        gaussians.quats,
        (thinner.sqrt() * pixel).to(gaussians.scales.dtype),
        (gaussians.opacities.double() * ratio).clamp(0, 1).to(gaussians.opacities.dtype),
        gaussians.sh,
    )
    note = {"screen_filter": VIEWER_FILTER, "antialiased": False, "filter_baked_for_pixel": round(pixel, 6)}
    return baked, note
