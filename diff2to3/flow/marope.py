"""MARoPE (P3.2): rotary positions that voxels and image patches share.

A voxel token at (x, y, z) of the G³ token grid keeps its coordinates. Patch (i, j) of the image sits at
(i, j, z_max + 1) with z_max = G − 1: a plane just outside the volume. Where the image's patch grid is not G
wide, its indices are scaled so that both grids span the same length (centre to centre): i' = (i + ½) G/h − ½.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diff2to3.flow.tokens import ImageTokens
from diff2to3.nn.attention import rotary_tables


def voxel_ids(coords: Tensor) -> Tensor:
    """Positions float32 [M, 3] of voxel tokens at ``coords`` int32 [M, 4] (batch, x, y, z)."""
    return coords[:, 1:].to(torch.float32)


def image_ids(image: ImageTokens, grid: int) -> Tensor:
    """Positions float32 [T, 3] of image tokens beside a volume of ``grid``³ tokens."""
    doubled = (2 * image.indices + 1) * grid  # exact in integers, so that equal scales give exactly (i, j)
    in_plane = doubled.to(torch.float32) / (2 * image.grids).to(torch.float32) - 0.5
    depth = in_plane.new_full((len(in_plane), 1), float(grid))
    return torch.cat([in_plane, depth], 1)


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with x, y and z: 64 → (22, 22, 20)."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: rotary embedding needs an even width a head, got {head_dim}")
    pairs, more = divmod(head_dim // 2, 3)
    x, y, z = (2 * (pairs + (axis < more)) for axis in range(3))
    return x, y, z


def marope_tables(ids: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, head_dim / 2] for :func:`diff2to3.nn.attention.apply_rotary`."""
    return rotary_tables(ids, axis_dims(head_dim), theta)
