"""Leave out the Gaussians of an object that nobody sees: those inside it, and next to transparent ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diff2to3.gaussians.render import EPS2D
from diff2to3.kernels.rasterize import blending_weights
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, sample_cameras

#: The pictures that are looked at: directions spread over the sphere, pixels a side, and how many at a time.
NUM_VIEWS, SIZE, CHUNK = 16, 128, 4


def shown(gaussians: Gaussians) -> Tensor:
    """Pixels that each Gaussian fills in pictures from all sides, all together [G]: the sum of its blending weights."""
    cameras = sample_cameras(
        CameraConfig("sphere", num_views=NUM_VIEWS), SIZE, SIZE, np.random.default_rng(0)
    )
    viewmats, Ks = (camera.to(gaussians.means) for camera in cameras)
    total = torch.zeros_like(gaussians.opacities)
    with torch.inference_mode(False):  # weights are gradients; what inference mode made takes no part in any
        g = replace(gaussians, **{name: value.clone() for name, value in vars(gaussians).items()})
        for rows in torch.arange(NUM_VIEWS).split(CHUNK):
            masks = g.means.new_ones(len(rows), SIZE, SIZE)
            scene = (g.means, g.quats, g.scales, g.opacities, viewmats[rows].clone(), Ks[rows].clone())
            total = total + blending_weights(*scene, masks, eps2d=EPS2D, antialiased=True)[:, 0]
    return total


def without_hidden(gaussians: Gaussians, least: float) -> Gaussians:
    """Those that fill at least ``least`` pixels of pictures from all sides; all of them where none does."""
    kept = shown(gaussians) >= least
    return gaussians.chosen(kept) if bool(kept.any()) else gaussians
