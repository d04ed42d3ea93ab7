"""Between the voxels of the photo frame and positions in the photo.

A voxel centre (x, y, z) of the photo frame (see :mod:`diff2to3.views.photo_frame`) is seen at (u, v) of the crop, both
in [-1, 1] with v down, and at depth d in front of (negative) or behind the plane through the origin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Depths d that a frustum's bins cover: [-DEPTH_REACH, DEPTH_REACH]. The unit cube reaches 0.87 along its diagonal, but
#: what a photo shows of an object as wide as 0.85 lies within this for all but a few deep ones.
DEPTH_REACH = 0.6
#: Nearest depth of anything, in units of the photo frame.
_NEAR = 0.1


def voxel_centers(resolution: int, device: torch.device | None = None) -> Tensor:
    """Centres of the cells of the R³ grid, x slowest: [R³, 3]."""
    axis = (torch.arange(resolution, device=device) + 0.5) / resolution - 0.5
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def project_points(points: Tensor, elevations: Tensor, focals: Tensor) -> Tensor:
    """Points [N, 3] of the photo frame seen by B cameras → (u, v, d) [B, N, 3].

    Args:
        elevations: radians [B] above the horizon.
        focals: focal length over the crop's side [B].
    """
    x, y, z = (axis[None] for axis in points.unbind(1))
    cosine, sine, focal = elevations.cos()[:, None], elevations.sin()[:, None], focals[:, None]
    depth = (focal + y * cosine - z * sine).clamp(min=_NEAR)
    u = 2 * focal * x / depth
    v = -2 * focal * (y * sine + z * cosine) / depth
    return torch.stack([u, v, depth - focal], -1)


def sample_plane(maps: Tensor, seen: Tensor, *, outside: str = "border") -> Tensor:
    """Maps [B, C, h, w] of the crop at (u, v, d) [B, N, 3] → [B, C, N], bilinear. ``outside`` the crop: "border" or
    "zeros".
    """
    grid = seen[:, :, None, :2].to(maps.dtype)
    return F.grid_sample(maps, grid, padding_mode=outside, align_corners=False)[..., 0]


def sample_frustum(volume: Tensor, seen: Tensor) -> Tensor:
    """Volumes [B, C, D, h, w], D bins of depth over the crop, at (u, v, d) [B, N, 3] → [B, C, N], trilinear."""
    scale = seen.new_tensor([1.0, 1.0, 1 / DEPTH_REACH])
    grid = (seen * scale)[:, :, None, None].to(volume.dtype)
    return F.grid_sample(volume, grid, padding_mode="border", align_corners=False)[..., 0, 0]


def to_cube(x: Tensor) -> Tensor:
    """[B, C, R³] → [B, C, R, R, R]."""
    side = round(x.shape[-1] ** (1 / 3))
    return x.unflatten(-1, (side, side, side))


def fold(volume: Tensor) -> Tensor:
    """Cells of 2³ into channels: [B, C, R, R, R] → [B, 8 C, R/2, R/2, R/2], C slowest."""
    batch, channels, side = volume.shape[:3]
    half = side // 2
    cells = volume.reshape(batch, channels, half, 2, half, 2, half, 2)
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, 8 * channels, half, half, half)


def unfold(volume: Tensor) -> Tensor:
    """The inverse of :func:`fold`."""
    batch, channels, side = volume.shape[:3]
    cells = volume.reshape(batch, channels // 8, 2, 2, 2, side, side, side)
    return cells.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, channels // 8, *(2 * side,) * 3)
