"""Voxels that fill the photo's silhouette, and no more: what stage 1 found, corrected where the photo shows better.

logits [R, R, R] ─ above the threshold ─▶ voxels ─ carve what projects beside the silhouette ─▶
                                          for each cell of the picture that is object and that no voxel covers:
                                          the likeliest voxel along its ray
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.voxels.lift_photo import CropCamera, in_crop, sample

#: A voxel is looked at in so many points along each axis, as in lift_photo.
_POINTS = 3


def fit_silhouette(logits: Tensor, alpha: Tensor, camera: CropCamera, threshold: float = 0.0) -> Tensor:
    """Occupied voxels bool [R, R, R].

    Args:
        logits: [R, R, R] of occupancy over the photo frame's unit cube.
        alpha: [S, S] of the crop, S at least R.
        camera: of the crop.
        threshold: logits above it are occupied, where the silhouette allows it.

    Raises:
        ValueError: logits or alpha of a wrong shape.
    """
    if logits.ndim != 3 or len(set(logits.shape)) != 1:
        raise ValueError(f"logits: expected [R, R, R], got {list(logits.shape)}")
    side = logits.shape[0]
    if alpha.ndim != 2 or alpha.shape[0] != alpha.shape[1] or alpha.shape[0] < side:
        raise ValueError(f"alpha: expected [S, S] with S of at least {side}, got {list(alpha.shape)}")
    axis = torch.arange(side, device=logits.device)
    cells = torch.cartesian_prod(axis, axis, axis)
    centres = (cells.float() + 0.5) / side - 0.5
    place, _ = in_crop(centres, camera)
    pixels = F.interpolate(alpha[None, None].float(), size=(2 * side, 2 * side), mode="area")
    near = F.max_pool2d(pixels, 3, 1, 1)[0]
    outside = (place < 0).any(1) | (place >= 1).any(1)
    allowed = torch.where(outside, cut_off(alpha), sample(near, place)[:, 0] > 0.3)
    occupied = (logits.flatten() > threshold) & allowed
    solid = F.avg_pool2d(pixels, 2)[0, 0].flatten() > 0.5
    missing = solid & ~covered(cells[occupied], camera, side)
    # single logits are noisy: the mean of 3³ chooses neighbouring rays' voxels next to each other
    smooth = F.avg_pool3d(logits[None, None].float(), 3, 1, 1, count_include_pad=False).flatten()
    cell = (place * side).floor().long()
    index = torch.where(outside, side**2, cell[:, 1] * side + cell[:, 0])
    best = torch.full((side**2 + 1,), -torch.inf, device=logits.device)
    best = best.scatter_reduce(0, index, smooth.where(allowed, -torch.inf), "amax")
    wanted = F.pad(missing, (0, 1))[index] & (smooth == best[index]) & allowed
    return (occupied | wanted).view(side, side, side)


def cut_off(alpha: Tensor) -> Tensor:
    """Whether the object goes on beyond the crop [S, S]: bool, no axes. Only then may voxels project beside it."""
    border = torch.cat([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    return (border > 0.5).any()


def covered(cells: Tensor, camera: CropCamera, side: int) -> Tensor:
    """Which of the R² cells of the picture some voxel [N, 3] projects into: bool [R²], row by row."""
    axis = (torch.arange(_POINTS, device=cells.device) + 0.5) / _POINTS
    offsets = torch.cartesian_prod(axis, axis, axis)
    points = ((cells[:, None].float() + offsets) / side - 0.5).flatten(0, 1)
    place, depth = in_crop(points, camera)
    inside = (place >= 0).all(1) & (place < 1).all(1) & (depth > 0)
    at = (place[inside] * side).floor().long()
    found = torch.zeros(side**2, dtype=torch.bool, device=cells.device)
    found[at[:, 1] * side + at[:, 0]] = True
    return found
