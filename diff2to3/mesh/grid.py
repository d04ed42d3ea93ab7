"""Opacity of 3D Gaussians on a grid of points, and what of it is inside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diff2to3.kernels.rasterize_reference import rotation_from_quat
from diff2to3.types import Gaussians

#: Standard deviations along an axis beyond which a Gaussian does not count.
REACH = 3.0
#: Pairs of a Gaussian and a grid point that are looked at in one go.
CHUNK = 1 << 21


@dataclass(frozen=True)
class Grid:
    """Values [X, Y, Z] at the points ``low`` + ``step`` · (i, j, k)."""

    values: Tensor
    low: Tensor
    step: float


def opacity_grid(gaussians: Gaussians, resolution: int = 96, blur: float = 0.0) -> Grid:
    """What a point is hidden by: 1 − Π (1 − o_i exp(−½ d² of the point from Gaussian i)), float32.

    The grid holds the middle of all but the faintest Gaussians with three standard deviations around them, in cubic
    cells of which the longest side has ``resolution``; its border points are 0.

    Args:
        gaussians: at least one.
        blur: standard deviation, in cells, that is added to every Gaussian's. Those of a surface are flatter than a
            cell, and a grid that samples them as they are finds holes.
    """
    means = gaussians.means.detach().double().cpu()
    rotation = rotation_from_quat(gaussians.quats.detach().double().cpu())
    variances = gaussians.scales.detach().double().cpu().square().clamp_min(1e-12)
    opacities = gaussians.opacities.detach().double().cpu().clamp(0, 0.999)
    extent = REACH * torch.einsum("gij,gj->gi", rotation.square(), variances).sqrt()
    seen = opacities > 0.02
    if not bool(seen.any()):
        seen = torch.ones_like(seen)
    low, high = (means - extent)[seen].min(0).values, (means + extent)[seen].max(0).values
    margin = REACH * blur
    step = float((high - low).max()) / (resolution - 3 - 2 * margin)
    low, high = low - (1 + margin) * step, high + margin * step
    variances = variances + (blur * step) ** 2
    extent = (extent.square() + (margin * step) ** 2).sqrt()
    shape = [int(n) for n in ((high - low) / step).ceil().long() + 2]
    precision = torch.einsum("gij,gj,gkj->gik", rotation, 1 / variances, rotation)
    logs = torch.zeros(shape[0] * shape[1] * shape[2])
    first = ((means - extent - low) / step).ceil().long().clamp_min(1)
    last = torch.minimum(((means + extent - low) / step).floor().long(), torch.tensor(shape) - 2)
    size = (last - first + 1).clamp_min(0)
    counts = size.prod(1) * seen
    order = torch.nonzero(counts).flatten()
    ends = counts[order].cumsum(0)
    start = 0
    while start < len(order):
        done = int(ends[start - 1]) if start else 0
        stop = max(int(torch.searchsorted(ends, done + CHUNK, right=True)), start + 1)
        add_pairs(logs, order[start:stop], counts, first, size, shape, means, low, step, precision, opacities)
        start = stop
    values = -torch.expm1(logs)
    return Grid(values.reshape(shape[0], shape[1], shape[2]), low, step)


def add_pairs(
    logs: Tensor, chosen: Tensor, counts: Tensor, first: Tensor, size: Tensor, shape: list[int], means: Tensor,
    low: Tensor, step: float, precision: Tensor, opacities: Tensor,
) -> None:  # fmt: skip
    """Add ln(1 − alpha) of the Gaussians ``chosen`` to ``logs``, flat, at every point of their boxes."""
    g = torch.repeat_interleave(chosen, counts[chosen])
    inside = torch.arange(len(g)) - torch.repeat_interleave(
        counts[chosen].cumsum(0) - counts[chosen], counts[chosen]
    )
    n = size[g]
    z, y, x = inside % n[:, 2], inside // n[:, 2] % n[:, 1], inside // (n[:, 2] * n[:, 1])
    at = torch.stack((x, y, z), 1) + first[g]
    # float32 is enough, since offsets are small
    offset = (at.double() * step + (low - means[g])).float()
    p = precision.float()[g]
    square = torch.einsum("ni,nij,nj->n", offset, p, offset)
    alpha = opacities.float()[g] * torch.exp(-0.5 * square)
    logs.index_add_(0, (at[:, 0] * shape[1] + at[:, 1]) * shape[2] + at[:, 2], torch.log1p(-alpha))


def fill_inside(values: np.ndarray, level: float) -> np.ndarray:
    """A copy in which the points that no path below ``level`` joins to the border are at least 1: hollow objects become
    solid, so that only their outer surface is left.
    """
    free = np.pad(values < level, 1, constant_values=True)
    outside = np.zeros_like(free)
    outside[0] = outside[-1] = True
    outside[:, 0] = outside[:, -1] = True
    outside[:, :, 0] = outside[:, :, -1] = True
    while True:
        before = int(outside.sum())
        for axis in range(3):
            spread(outside, free, axis)
        if int(outside.sum()) == before:
            break
    inside = ~outside[1:-1, 1:-1, 1:-1]
    return np.where(inside & (values < level), 1.0, values).astype(np.float32)


def spread(outside: np.ndarray, free: np.ndarray, axis: int) -> None:
    """Sweep along an axis, there and back, through free points."""
    o, f = np.moveaxis(outside, axis, 0), np.moveaxis(free, axis, 0)
    for i in range(1, len(o)):
        o[i] |= o[i - 1] & f[i]
    for i in range(len(o) - 2, -1, -1):
        o[i] |= o[i + 1] & f[i]
