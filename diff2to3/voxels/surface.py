"""What the pixels of views with depth say about each voxel: colour and shape of the surface inside it.

Image features are sampled at a voxel's centre, once a view. Here every pixel is put back into space by its
depth and counted where it falls, so that a voxel knows its mean colour, its mean surface point, how both vary
and how they vary together, to a fraction of the voxel. A small autoencoder needs this beside learned features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diff2to3.types import Views
from diff2to3.voxels.aggregate import VoxelFeatures

#: (name, channels, factor that brings the values to about unit variance), in the order of the features. Positions
#: are in voxels from the voxel's centre, colours sRGB-encoded minus 0.5.
STATISTICS = (
    ("color", 3, 4.0),  # mean
    ("point", 3, 4.0),  # mean
    ("normal", 3, 1.5),  # mean of the unit vectors to the cameras: on which side the air is
    ("color_spread", 3, 12.0),  # standard deviation
    ("point_covariance", 6, 16.0),  # xx, yy, zz, xy, xz, yz
    ("color_by_point", 9, 80.0),  # covariance, [colour, axis]
    ("coverage", 1, 0.5),  # log(1 + pixels) - 3
)
CHANNELS = sum(size for _, size, _ in STATISTICS)


def channels_of(name: str) -> slice:
    """Where a statistic lies in the features. Raises ValueError for an unknown name."""
    start = 0
    for known, size, _ in STATISTICS:
        if known == name:
            return slice(start, start + size)
        start += size
    raise ValueError(f"name: unknown statistic {name!r}; known are {', '.join(n for n, _, _ in STATISTICS)}")


def surface_statistics(views: Views, coords: Tensor, resolution: int) -> VoxelFeatures:
    """Statistics of the pixels that fall into each voxel of one object: feats [N, 28].

    Pixels count where alpha is above one half and there is depth. A voxel that no pixel falls into has zeros,
    but for its coverage; ``num_views`` is the number of *pixels* that fell into a voxel.

    Args:
        views: with ``depths``.
        coords: int [N, 3] cells of the R³ grid.

    Raises:
        ValueError: no depths, or coordinates of a wrong shape.
    """
    if views.depths is None:
        raise ValueError("views: surface statistics need depths")
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise ValueError(f"coords: expected shape [N, 3], got {list(coords.shape)}")
    points, colors, towards = seen_points(views)
    rows, offsets = locate(points, coords, resolution)
    kept = rows >= 0
    rows, offsets, colors, towards = rows[kept], offsets[kept], colors[kept], towards[kept]
    count = torch.zeros(len(coords), dtype=torch.float64, device=rows.device)
    count.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
    products = torch.cat(
        [
            colors,
            offsets,
            towards,
            colors.square(),
            offsets.square(),
            offsets[:, [0, 0, 1]] * offsets[:, [1, 2, 2]],
            (colors[:, :, None] * offsets[:, None, :]).flatten(1),
        ],
        1,
    )
    # float32 sums of a few hundred terms are exact to 1e-5; variances below are of order 1e-2
    sums = torch.zeros(len(coords), products.shape[1], device=rows.device).index_add_(0, rows, products)
    means = sums / count.clamp(min=1).to(sums.dtype)[:, None]
    color, point, towards, color2, square, cross, color_point = means.split([3, 3, 3, 3, 3, 3, 9], 1)
    parts = [
        color,
        point,
        towards,
        (color2 - color.square()).clamp(min=0).sqrt(),
        torch.cat([square - point.square(), cross - point[:, [0, 0, 1]] * point[:, [1, 2, 2]]], 1),
        color_point - (color[:, :, None] * point[:, None, :]).flatten(1),
        torch.log1p(count).to(sums.dtype)[:, None] - 3,
    ]
    feats = torch.cat([part * factor for part, (_, _, factor) in zip(parts, STATISTICS, strict=True)], 1)
    return VoxelFeatures(feats, count.to(torch.int32))


def seen_points(views: Views) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel that sees the object, put back into space.

    Returns points [P, 3] in the object frame, colours [P, 3] minus 0.5, and unit vectors [P, 3] to the camera.
    """
    assert views.depths is not None
    seen = (views.depths > 0) & (views.alphas > 0.5)
    view, y, x = seen.nonzero(as_tuple=True)
    depth = views.depths[seen]
    K = views.Ks[view]
    in_camera = torch.stack(
        [
            (x + 0.5 - K[:, 0, 2]) / K[:, 0, 0] * depth,
            (y + 0.5 - K[:, 1, 2]) / K[:, 1, 1] * depth,
            depth,
        ],
        1,
    )
    rotation, translation = views.viewmats[:, :3, :3], views.viewmats[:, :3, 3]
    centers = -torch.einsum("vji,vj->vi", rotation, translation)
    rays = torch.einsum("pji,pj->pi", rotation[view], in_camera)
    towards = -torch.nn.functional.normalize(rays, dim=1)
    return centers[view] + rays, views.images[seen] - 0.5, towards


def locate(points: Tensor, coords: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """The rows of ``coords`` whose cells hold the points, -1 where none does, and the points' offsets [P, 3] from
    those cells' centres, in voxels.

    A surface that lies in the plane between two cells belongs to whichever of them is active: points up to a
    tenth of a voxel outside an active cell are taken in by it, along one axis.
    """
    table = torch.full((resolution + 2,) * 3, -1, dtype=torch.int64, device=coords.device)
    x, y, z = (coords.long() + 1).unbind(1)
    table[x, y, z] = torch.arange(len(coords), device=coords.device)
    in_grid = (points + 0.5) * resolution
    cell = in_grid.floor().clamp(-1, resolution).long()
    offsets = in_grid - cell - 0.5
    rows = table[tuple((cell + 1).unbind(1))]
    lost = (rows < 0).nonzero()[:, 0]
    if len(lost):
        axis = offsets[lost].abs().argmax(1)
        at = torch.arange(len(lost), device=points.device)
        excess = offsets[lost, axis]
        step = torch.zeros_like(cell[lost])
        step[at, axis] = excess.sign().long()
        neighbor = (cell[lost] + step + 1).clamp(0, resolution + 1)
        found = torch.where(excess.abs() > 0.4, table[tuple(neighbor.unbind(1))], -1)
        rows[lost] = found
        offsets[lost] = torch.where(found[:, None] >= 0, offsets[lost] - step, offsets[lost])
    return rows, offsets
