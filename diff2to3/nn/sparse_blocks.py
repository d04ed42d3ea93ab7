"""Residual blocks of submanifold convolutions, with an optional change of resolution and time modulation.

Parameter names and shapes are TRELLIS's (``conv1.conv.weight`` is [out, kx, ky, kz, in]).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.kernels.neighbors import NeighborPlan
from diff2to3.nn.items import spread_by_item
from diff2to3.nn.sparse_conv import SubmanifoldConv3d
from diff2to3.nn.sparse_patchify import PatchPlan, SparseDownsample, SparseUpsample
from diff2to3.nn.transformer import LayerNorm, modulate


class Convolution(nn.Module):
    """A submanifold convolution under the name that TRELLIS's checkpoints give it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | str = 3) -> None:
        super().__init__()
        self.conv = SubmanifoldConv3d(in_channels, out_channels, kernel)

    def forward(self, x: Tensor, neighbors: NeighborPlan) -> Tensor:
        return self.conv(x, neighbors)


class SparseResBlock(nn.Module):
    """resample(x) + conv(SiLU(norm(conv(SiLU(norm(resample(x))))))), the second norm modulated by time.

    resample   None, "down" (reduce 2³ patches) or "up" (every voxel takes its patch's row)
    reduce     how "down" reduces; TRELLIS's weights need "mean_with_zero"
    time_width width of the time embedding; None for a block without modulation
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time_width: int | None = None,
        resample: str | None = None,
        reduce: str = "mean",
        kernel: int | str = 3,
    ) -> None:
        super().__init__()
        if resample not in (None, "down", "up"):
            raise ValueError(f"resample: expected None, 'down' or 'up', got {resample!r}")
        self.resample = resample
        if resample is not None:
            self.resampler = SparseDownsample(reduce) if resample == "down" else SparseUpsample()
        modulated = time_width is not None
        self.norm1 = LayerNorm(channels, eps=1e-6)
        self.norm2 = LayerNorm(out_channels, elementwise_affine=not modulated, eps=1e-6)
        self.conv1 = Convolution(channels, out_channels, kernel)
        self.conv2 = Convolution(out_channels, out_channels, kernel)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)
        self.emb_layers = (
            nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * out_channels))
            if time_width is not None
            else None
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Linear(channels, out_channels)

    def forward(
        self,
        x: Tensor,
        neighbors: NeighborPlan,
        patches: PatchPlan | None = None,
        time: Tensor | None = None,
        batch_index: Tensor | None = None,
    ) -> Tensor:
        """x [N, C] → [M, C'], where ``neighbors`` and ``batch_index`` are those of the M output voxels.

        time [B, time_width]; batch_index as in :func:`diff2to3.nn.items.spread_by_item`.
        """
        if self.resample is not None:
            if patches is None:
                raise ValueError(f"patches: a block with resample={self.resample!r} needs a plan")
            x = self.resampler(x, patches)
        h = self.conv1(F.silu(self.norm1(x)), neighbors)
        h = self.norm2(h)
        if self.emb_layers is not None:
            if time is None:
                raise ValueError("time: this block is modulated by time, so it needs an embedding")
            scale, shift = spread_by_item(self.emb_layers(time), batch_index).chunk(2, -1)
            h = modulate(h, shift, scale)
        h = self.conv2(F.silu(h), neighbors)
        return h + self.skip_connection(x)
