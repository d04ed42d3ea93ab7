"""Pictures of Gaussians from all around."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from diff2to3.gaussians.render import render, to_uint8
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, sample_cameras

#: Frames of one turn by file ending: a sheet shows a few, an animation wants many.
DEFAULT_VIEWS = {".png": 8, ".gif": 48, ".mp4": 120}


def turntable(
    gaussians: Gaussians,
    num_views: int,
    resolution: int,
    *,
    elevation: float = 20.0,
    background: float = 1.0,
    azimuth: float = 0.0,
) -> np.ndarray:
    """Frames uint8 [V, R, R, 3] of one turn around an object in the unit box. The first camera stands at ``azimuth``
    degrees around z from +x.
    """
    # wide enough for all but the corners of the unit box
    config = CameraConfig("orbit", num_views=num_views, fov_degrees=48.0, elevation=elevation)
    viewmats, Ks = sample_cameras(config, resolution, resolution, np.random.default_rng(0))
    angle = torch.tensor(azimuth, dtype=viewmats.dtype).deg2rad()
    turned = torch.eye(4, dtype=viewmats.dtype)
    turned[0, 0] = turned[1, 1] = angle.cos()
    turned[0, 1], turned[1, 0] = angle.sin(), -angle.sin()
    viewmats = viewmats @ turned  # the world is turned back, so that every camera stands further
    return frames(gaussians, zip(viewmats, Ks, strict=True), resolution, background)


@torch.no_grad()
def frames(
    gaussians: Gaussians,
    cameras: Iterable[tuple[Tensor, Tensor]],
    resolution: int,
    background: float,
    backend: str = "auto",
) -> np.ndarray:
    """Frames uint8 [V, R, R, 3] for V pairs of viewmat [4, 4] and K [3, 3].

    One view at a time, so that memory does not grow with their number. ``backend``: as in
    :func:`diff2to3.gaussians.render.render`.
    """
    device, size = gaussians.means.device, (resolution, resolution)
    out = []
    for viewmat, K in cameras:
        views = (viewmat[None].to(device), K[None].to(device))
        colors = render(gaussians, *views, *size, background=background, backend=backend).colors
        out.append(to_uint8(colors[0]).cpu().numpy())
    return np.stack(out)
