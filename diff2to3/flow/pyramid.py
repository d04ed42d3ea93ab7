"""From sparse voxels to tokens and back: residual convolutions with a change of resolution between levels.

    voxels [N, C] ─blocks, 2³ patches─▶ … ─▶ tokens [M, D]        mirrored, with skips, on the way back

The baseline and SMDiT share it. What depends on coordinates alone is built once (:func:`build_levels`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diff2to3.kernels.neighbors import NeighborPlan, neighbor_plan
from diff2to3.kernels.patchify import PatchPlan, patch_plan
from diff2to3.nn.sparse_blocks import SparseResBlock


@dataclass(frozen=True)
class Level:
    """One resolution of the sparse pyramid: its voxels' neighbours and batch items, and the patches they form
    for the next (coarser) level; the last level has none.
    """

    neighbors: NeighborPlan | None
    batch_index: Tensor | None
    patches: PatchPlan | None


def build_levels(
    coords: Tensor, num_halvings: int, batch_size: int, kernel: int | str = 3
) -> tuple[tuple[Level, ...], Tensor]:
    """The levels from voxels int32 [N, 4] to tokens, finest first, and the tokens' coordinates [M, 4]."""
    levels = []
    for _ in range(num_halvings):
        patches = patch_plan(coords, 2)
        levels.append(Level(neighbor_plan(coords, kernel), items_of(coords, batch_size), patches))
        coords = patches.coords
    neighbors = neighbor_plan(coords, kernel) if levels else None
    levels.append(Level(neighbors, items_of(coords, batch_size), None))
    return tuple(levels), coords


def items_of(coords: Tensor, batch_size: int) -> Tensor | None:
    """The batch item of every row; None where there is but one."""
    return None if batch_size == 1 else coords[:, 0].long()


def input_blocks(
    widths: Sequence[int], num_blocks: int, time_width: int, reduce: str, kernel: int | str = 3
) -> nn.ModuleList:
    """``num_blocks`` a level, the last of which goes to the next; widths from the voxels' to the tokens'."""
    blocks = nn.ModuleList()
    for width, coarser in itertools.pairwise(widths):
        for _ in range(num_blocks - 1):
            blocks.append(SparseResBlock(width, width, time_width, kernel=kernel))
        blocks.append(SparseResBlock(width, coarser, time_width, "down", reduce, kernel))
    return blocks


def output_blocks(
    widths: Sequence[int], num_blocks: int, time_width: int, skip_connection: bool, kernel: int | str = 3
) -> nn.ModuleList:
    """The mirror of :func:`input_blocks`; twice the width goes in where skips are concatenated."""
    blocks = nn.ModuleList()
    double = 2 if skip_connection else 1
    for width, coarser in zip(widths[-2::-1], widths[:0:-1], strict=True):
        blocks.append(SparseResBlock(double * coarser, width, time_width, "up", kernel=kernel))
        for _ in range(num_blocks - 1):
            blocks.append(SparseResBlock(double * width, width, time_width, kernel=kernel))
    return blocks


def descend(
    blocks: Iterable[nn.Module], h: Tensor, time: Tensor, levels: Sequence[Level]
) -> tuple[Tensor, list[Tensor]]:
    """Voxels to tokens; also every block's output, for the skip connections."""
    skips, level = [], 0
    for block in blocks:
        here, patches = levels[level], levels[level].patches
        if block.resample == "down":
            level += 1
            here = levels[level]
        h = block(h, here.neighbors, patches, time, here.batch_index)
        skips.append(h)
    return h, skips


def ascend(
    blocks: nn.ModuleList,
    h: Tensor,
    skips: Sequence[Tensor],
    time: Tensor,
    levels: Sequence[Level],
    skip_connection: bool,
) -> Tensor:
    """Tokens to voxels: the mirror of :func:`descend`."""
    level = len(levels) - 1
    for block, skip in zip(blocks, reversed(skips), strict=True):
        if block.resample == "up":
            level -= 1
        here = levels[level]
        if skip_connection:
            h = torch.cat([h, skip], 1)
        h = block(h, here.neighbors, here.patches, time, here.batch_index)
    return h
