"""Colours of what the photo does not see.

A small flow model guesses them one voxel at a time, with noise from voxel to voxel that no real surface has. Most
objects have the same colours behind as in front, at the same height and side. So a hidden Gaussian takes the colour of
the visible ones before it, blurred, mixed with the guesses around it; of its own guess only the light and dark stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diff2to3.types import Gaussians

#: Cells a side of the grid that colours are averaged over.
CELLS = 16


@dataclass(frozen=True)
class HiddenConfig:
    """share    of a hidden colour that comes from the visible surface before it; 0 leaves hidden colours as they are
    detail   how much of a Gaussian's own lighter or darker stays
    across   deviation of the blur across the photo, in cells; depth: along it
    guesses  deviation of the blur of the guesses
    glimpse  what the photo sees of a Gaussian above which it stays as it is: changing what is seen a little costs
             1.7 dB at the photo's camera
    """

    share: float = 0.8
    detail: float = 0.4
    across: float = 2.0
    depth: float = 8.0
    guesses: float = 0.8
    glimpse: float = 1 / 6


def quiet_hidden(gaussians: Gaussians, seen: Tensor, config: HiddenConfig | None = None) -> Gaussians:
    """The same Gaussians with quiet colours where the photo does not see them.

    Args:
        gaussians: in the photo frame, whose camera looks along +y; of SH only degree 0 is changed.
        seen: [G] how much of each the photo sees, 0 to 1.
    """
    c = config or HiddenConfig()
    if not c.share or not bool((seen > 0.05).any()):
        return gaussians
    colors = gaussians.sh[:, 0]
    sizes = gaussians.opacities * gaussians.scales.prod(1).clamp(min=1e-12) ** (2 / 3)
    sizes = sizes / sizes.mean().clamp(min=1e-12)
    before = weighted_mean(gaussians.means, colors, sizes * seen.square(), (c.across, c.depth, c.across))
    hidden = (1 - seen / c.glimpse).clamp(min=0)
    guesses = weighted_mean(gaussians.means, colors, sizes * hidden.square(), (c.guesses,) * 3)
    detail = (colors - guesses).mean(1, keepdim=True)
    quiet = c.share * before + (1 - c.share) * guesses + c.detail * detail
    mixed = colors + hidden[:, None] * (quiet - colors)
    return replace(gaussians, sh=torch.cat([mixed[:, None], gaussians.sh[:, 1:]], 1))


def weighted_mean(
    means: Tensor, values: Tensor, weights: Tensor, reach: tuple[float, float, float]
) -> Tensor:
    """The mean of ``values`` [G, C] around every point, by ``weights`` [G] and distance: [G, C]."""
    sums = grid_sums(means, values, weights + 1e-9, reach)
    return sums[:, :-1] / sums[:, -1:].clamp(min=1e-30)


def grid_sums(means: Tensor, values: Tensor, weights: Tensor, reach: tuple[float, float, float]) -> Tensor:
    """Sums of ``weights`` · ``values`` [G, C] and of ``weights`` [G] over a grid of CELLS³ cells of the unit cube,
    blurred by a Gaussian with deviations of ``reach`` cells along x, y and z, and read at every point: [G, C + 1].
    """
    cell = ((means + 0.5) * CELLS).floor().clamp(0, CELLS - 1).long()
    index = (cell[:, 0] * CELLS + cell[:, 1]) * CELLS + cell[:, 2]
    sums = means.new_zeros(CELLS**3, values.shape[1] + 1)
    sums.index_add_(0, index, torch.cat([values * weights[:, None], weights[:, None]], 1))
    steps = torch.arange(CELLS, device=means.device)
    apart = (steps[:, None] - steps[None]).abs().to(means)
    x, y, z = (torch.exp(-0.5 * (apart / deviation).square()) for deviation in reach)
    grid = torch.einsum("ai,bj,ck,ijkn->abcn", x, y, z, sums.view(CELLS, CELLS, CELLS, -1))
    return grid.flatten(0, 2)[index]
