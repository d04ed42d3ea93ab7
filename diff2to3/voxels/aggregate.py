"""Lifting image features onto voxels (P3.1): a voxel's feature is the mean of what its centre projects to.

``mean``     over all views, as the paper and TRELLIS do. A voxel on the back of the object then also averages
             what occludes it in the front views.
``visible``  over the views that see the voxel: the rendered depth agrees with the voxel's own to within
             ``depth_tolerance`` voxels at all four pixels around its projection, so that a sample next to an
             occluding edge or the silhouette does not count. What is too thin for that takes the views in
             which the nearest pixel agrees; a voxel that no view sees falls back to ``mean``, and its
             ``num_views`` is 0.

Where alpha is below one the encoder sees a plain ``background``; mid-grey by default, because it is the
colour whose largest difference from any object is smallest, and so bleeds least into the features along
silhouettes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.types import Views
from diff2to3.voxels.providers import FeatureProvider

MODES = ("mean", "visible")


@dataclass(frozen=True)
class VoxelFeatures:
    """feats [N, C] float32; num_views [N] int32: how many views were averaged, 0 where ``visible`` fell
    back."""

    feats: Tensor
    num_views: Tensor


def project(points: Tensor, viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, 3] in V cameras: pixel positions [V, N, 2] and depths z [V, N] in the camera frame."""
    in_camera = torch.einsum("vij,nj->vni", viewmats[:, :3, :3], points) + viewmats[:, None, :3, 3]
    depths = in_camera[..., 2]
    on_plane = in_camera / depths.clamp(min=1e-8)[..., None]
    return torch.einsum("vij,vnj->vni", Ks[:, :2], on_plane), depths


def sample_bilinear(maps: Tensor, pixels: Tensor, height: int, width: int) -> Tensor:
    """Feature maps [V, C, h, w] that cover H x W images, at pixel positions [V, N, 2]: [V, N, C].

    The centre of the top-left pixel is (0.5, 0.5), so map cell (0, 0) of stride s is centred on (s/2, s/2).
    Positions outside the image take the border's value.
    """
    size = torch.tensor([width, height], dtype=pixels.dtype, device=pixels.device)
    grid = 2 * pixels / size - 1
    sampled = F.grid_sample(
        maps, grid[:, None].to(maps.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[:, :, 0].transpose(1, 2)


def aggregate_features(
    views: Views,
    coords: Tensor,
    resolution: int,
    provider: FeatureProvider,
    *,
    mode: str = "visible",
    depth_tolerance: float = 1.0,
    background: float = 0.5,
    view_chunk: int = 4,
) -> VoxelFeatures:
    """Features of the voxels of one object.

    Args:
        views: images with cameras; ``visible`` also needs ``depths``.
        coords: int [N, 3] cell indices in the R³ grid.
        resolution: R.
        provider: the image encoder.
        mode: ``mean`` or ``visible``.
        depth_tolerance: in voxels; the surface is at most 0.87 from the centre of a voxel it crosses.
        background: grey level behind the object.
        view_chunk: views encoded and sampled at a time; bounds the memory. Sums are float32, in view order.

    Raises:
        ValueError: an unknown mode, no views, coordinates of a wrong shape, or no depths for ``visible``.
    """
    weighting = weigh_views(views, coords, resolution, mode, depth_tolerance)
    (feats,) = lift(views, provider, [weighting], background, view_chunk)
    return VoxelFeatures(feats, weighting.num_views)


@dataclass(frozen=True)
class ViewWeights:
    """Where voxels project and which views count: pixels [V, N, 2], weights [V, N], num_views int32 [N]."""

    pixels: Tensor
    weights: Tensor
    num_views: Tensor


def weigh_views(
    views: Views, coords: Tensor, resolution: int, mode: str, depth_tolerance: float = 1.0
) -> ViewWeights:
    """The views that count for each voxel; see :func:`aggregate_features`. Every voxel has at least one."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "visible" and views.depths is None:
        raise ValueError("views: mode 'visible' needs depths")
    if len(views) == 0:
        raise ValueError("views: expected at least one")
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise ValueError(f"coords: expected shape [N, 3], got {list(coords.shape)}")
    centers = (coords.to(views.viewmats) + 0.5) / resolution - 0.5
    pixels, depths = project(centers, views.viewmats, views.Ks)
    weights = inside = _inside(pixels, depths, views.height, views.width)
    num_views = inside.sum(0)
    if mode == "visible":
        near, all_four = _agreement(views, pixels, depths, depth_tolerance / resolution)
        near, all_four = near & inside, all_four & inside
        weights = torch.where(all_four.any(0), all_four, near)
        num_views = weights.sum(0)
        weights = torch.where(weights.any(0), weights, inside)
    weights = torch.where(weights.any(0), weights, True)  # in no image at all: the borders of all
    return ViewWeights(pixels, weights.float(), num_views.to(torch.int32))


def lift(
    views: Views,
    provider: FeatureProvider,
    weightings: Sequence[ViewWeights],
    background: float = 0.5,
    view_chunk: int = 4,
) -> list[Tensor]:
    """Weighted means of the views' features, [N, C] a weighting, encoding every view once."""
    sums = [torch.zeros(w.weights.shape[1], provider.channels, device=w.weights.device) for w in weightings]
    for start in range(0, len(views), view_chunk):
        chunk = range(start, min(start + view_chunk, len(views)))
        maps = provider.encode(views.select(list(chunk)).composite(background))
        for view, feature_map in zip(chunk, maps.to(views.images.device, torch.float32), strict=True):
            for total, w in zip(sums, weightings, strict=True):
                pixels = w.pixels[view, None]
                feats = sample_bilinear(feature_map[None], pixels, views.height, views.width)[0]
                total += feats * w.weights[view, :, None]
    return [total / w.weights.sum(0)[:, None] for total, w in zip(sums, weightings, strict=True)]


def _inside(pixels: Tensor, depths: Tensor, height: int, width: int) -> Tensor:
    """[V, N] whether a voxel centre is in front of the camera and projects into the image."""
    x, y = pixels.unbind(-1)
    return (depths > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _agreement(views: Views, pixels: Tensor, depths: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """[V, N] twice: whether the surface seen at the nearest pixel, and at all four pixels that a bilinear
    sample mixes, is the voxel's own, to within ``tolerance`` in depth.

    Two-sided: a surface far behind the voxel means that the ray just misses the voxel's surface, and the
    image there shows something else.
    """
    assert views.depths is not None
    rows = torch.arange(len(views), device=pixels.device)[:, None]

    def agrees(x: Tensor, y: Tensor) -> Tensor:
        x = x.floor().clamp(0, views.width - 1).long()
        y = y.floor().clamp(0, views.height - 1).long()
        assert views.depths is not None
        surface = views.depths[rows, y, x]
        return (surface > 0) & ((surface - depths).abs() <= tolerance)

    x, y = pixels.unbind(-1)
    corners = [agrees(x + dx, y + dy) for dx in (-0.5, 0.5) for dy in (-0.5, 0.5)]
    return agrees(x, y), torch.stack(corners).all(0)
