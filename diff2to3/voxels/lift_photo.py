"""Lifting the condition photo onto voxels: what the photo says about each voxel, for a known or guessed camera.

    photo ─encoders─▶ maps [C, h, w] ┐
          ─────────── colour, alpha  ├─ sampled where the voxel's centre projects ─▶ [N, C + 8]
    camera, voxels ── z-buffer       ┘

The training features are means over many views with rendered depth (:mod:`diff2to3.voxels.aggregate`). A photo is a
single view without depth, so that which voxels it sees follows from the voxels themselves: in the cell of the picture
in which a voxel projects, the nearest voxel hides the others.

    channel        what it is
    0 to 2         colour over mid-grey, minus 0.5, times 2
    3              alpha
    4              visible: the share of the voxel's points that no voxel in front hides
    5              depth behind the plane through the origin, in units of the frame, times 2
    6              depth behind the nearest voxel of the same cell of the picture, times 4, at most 2
    7              1: there is a photo (an item without one has zeros everywhere)
    8 on           the maps', in their order
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.voxels.aggregate import project, sample_bilinear

#: Channels beside the maps'.
GEOMETRY_CHANNELS = 8
#: A voxel is looked at in so many points along each axis: at twice the usual magnification they are still no further
#: apart than the cells of the z-buffer.
_POINTS = 3
#: So many voxels behind the nearest one still counts as seen: a slanted surface does not hide itself.
_TOLERANCE = 2


class CropCamera(Protocol):
    """What is needed of a camera (:class:`diff2to3.views.photo_frame.PhotoCamera` is one)."""

    @property
    def focal(self) -> float:
        """Focal length over the side of the crop, and distance from the origin."""
        ...

    @property
    def viewmat(self) -> Tensor:
        """World to camera [4, 4]."""
        ...

    def K(self, size: int) -> Tensor:
        """Intrinsics [3, 3] in pixels of a crop of ``size`` pixels a side."""
        ...


def lift_photo(
    maps: Tensor | Sequence[Tensor],
    alpha: Tensor,
    rgb: Tensor,
    camera: CropCamera,
    coords: Tensor,
    resolution: int,
) -> Tensor:
    """What one photo says about the voxels of one object: float32 [N, 8 + channels of the maps].

    Args:
        maps: one feature map [C, h, w] of the whole crop, or several of different sizes.
        alpha: [H, W] of the crop, in [0, 1]; any size, and so ``rgb``: about two pixels a voxel are enough.
        rgb: [H, W, 3] in [0, 1], not premultiplied.
        camera: of the crop, in the photo frame.
        coords: int [N, 3] cells of the R³ grid over the photo frame's unit cube.
        resolution: R.

    Raises:
        ValueError: coordinates, maps, alpha or rgb of a wrong shape.
    """
    several = [maps] if isinstance(maps, Tensor) else list(maps)
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise ValueError(f"coords: expected shape [N, 3], got {list(coords.shape)}")
    if any(m.ndim != 3 for m in several):
        raise ValueError(f"maps: expected [C, h, w], got {[list(m.shape) for m in several]}")
    if alpha.ndim != 2 or rgb.shape != (*alpha.shape, 3):
        raise ValueError(
            f"alpha, rgb: expected [H, W], [H, W, 3], got {list(alpha.shape)}, {list(rgb.shape)}"
        )
    place, depth = in_crop((coords.to(alpha) + 0.5) / resolution - 0.5, camera)
    visible, behind = visibility(coords, camera, resolution)
    picture = torch.cat([((rgb - 0.5) * alpha[..., None]).permute(2, 0, 1) * 2, alpha[None]])
    geometry = [visible, (depth - camera.focal) * 2, (behind * 4).clamp(max=2), torch.ones_like(depth)]
    sampled = [sample(m, place) for m in (picture, *several)]
    return torch.cat([sampled[0], torch.stack(geometry, 1), *sampled[1:]], 1).float()


def in_crop(points: Tensor, camera: CropCamera) -> tuple[Tensor, Tensor]:
    """Points [N, 3] of the photo frame: where they are in the crop [N, 2], 0 to 1 from the left and from the top, and
    their depths [N]."""
    viewmat, K = camera.viewmat.to(points), camera.K(1).to(points)
    place, depth = project(points, viewmat[None], K[None])
    return place[0], depth[0]


def sample(maps: Tensor, place: Tensor) -> Tensor:
    """A map [C, h, w] of the whole crop at places [N, 2] in it, bilinear: [N, C]. Outside, the border's value."""
    return sample_bilinear(maps[None], place[None], 1, 1)[0]


def visibility(coords: Tensor, camera: CropCamera, resolution: int) -> tuple[Tensor, Tensor]:
    """Which of the voxels [N, 3] the camera sees, as shares [N] in [0, 1], and how far they are behind the nearest one
    that projects to the same place [N], in units of the frame (0 for those in front).

    A z-buffer of R x R cells, each as wide as a voxel at the origin's depth, in which every voxel is 3³ points. Up to
    two voxels behind the front both are as if in front. Points outside the crop count as seen.
    """
    device = coords.device
    axis = (torch.arange(_POINTS, device=device) + 0.5) / _POINTS
    offsets = torch.cartesian_prod(axis, axis, axis)
    points = (coords[:, None].float() + offsets) / resolution - 0.5
    place, depth = in_crop(points.flatten(0, 1), camera)
    cell = (place * resolution).floor().long()
    inside = ((cell >= 0) & (cell < resolution)).all(1) & (depth > 0)
    index = torch.where(inside, cell[:, 1] * resolution + cell[:, 0], resolution**2)
    front = torch.full((resolution**2 + 1,), torch.inf, device=device)
    front = front.scatter_reduce(0, index, depth, "amin")
    past = torch.where(inside, depth - front[index], 0.0).view(-1, _POINTS**3)
    reach = _TOLERANCE / resolution
    return (past <= reach).float().mean(1), F.relu(past.mean(1) - reach)
