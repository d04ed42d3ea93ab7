"""Layers between voxels and the patches that hold them: pooling, its inverse, the patches as a container.

plan = patch_plan(voxels.coords, 2)
patches = patch_voxels(voxels, plan, SparseDownsample()(voxels.feats, plan))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diff2to3.kernels.patchify import REDUCTIONS, PatchPlan, patch_plan, patchify, unpatchify
from diff2to3.types import SparseVoxels

__all__ = ["PatchPlan", "SparseDownsample", "SparseUpsample", "patch_plan", "patch_voxels"]


class SparseDownsample(nn.Module):
    """One row a patch: [N, C] -> [M, C].

    ``reduce``: ``mean``, ``sum``, or ``mean_with_zero``, which is what TRELLIS's layer of this name computes:
    the mean of the voxels and one row of zeros, sum / (count + 1). The order of the patches (batch, x, y, z)
    is TRELLIS's too.
    """

    def __init__(self, reduce: str = "mean") -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        self.reduce = reduce

    def forward(self, feats: Tensor, plan: PatchPlan) -> Tensor:
        """``plan`` is the patch plan of the voxels that ``feats`` belong to."""
        return patchify(feats, plan, self.reduce)

    def extra_repr(self) -> str:
        return f"reduce={self.reduce!r}"


class SparseUpsample(nn.Module):
    """Every voxel gets the row of its patch: [M, C] -> [N, C]."""

    def forward(self, feats: Tensor, plan: PatchPlan) -> Tensor:
        """``plan`` is the patch plan of the voxels to return to."""
        return unpatchify(feats, plan)


def patch_voxels(voxels: SparseVoxels, plan: PatchPlan, feats: Tensor) -> SparseVoxels:
    """The patches of ``voxels`` as voxels of the coarser grid, with features [M, C]."""
    batch = plan.coords[:, 0].long()
    counts = torch.zeros(voxels.batch_size, dtype=torch.int64, device=batch.device)
    counts.scatter_add_(0, batch, torch.ones_like(batch))
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    resolution = -(-voxels.resolution // plan.patch_size)
    return SparseVoxels(plan.coords, feats, resolution, cu_seqlens)
