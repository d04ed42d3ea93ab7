"""The stack of blocks over sparse voxels that encoder and decoder share.

feats [N, Cin] ─Linear─▶ + position embedding ─▶ blocks (windowed attention / submanifold convolution) ─▶
[N, D]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diff2to3.kernels.neighbors import NeighborPlan, neighbor_plan
from diff2to3.nn.attention import Plan
from diff2to3.nn.embeddings import absolute_position_embedding
from diff2to3.nn.precision import cast_torso, precisely, torso_dtype
from diff2to3.nn.sequences import SequencePlan
from diff2to3.nn.sparse_blocks import SparseResBlock
from diff2to3.nn.transformer import TransformerBlock
from diff2to3.nn.windows import WindowPlan
from diff2to3.types import SparseVoxels
from diff2to3.vae.config import TorsoConfig


@dataclass(frozen=True)
class TorsoPlan:
    """Who meets whom, for one set of voxels: the attention plans that blocks take in turn, and the
    neighbours.
    """

    attention: tuple[Plan, ...]
    neighbors: NeighborPlan | None


class Torso(nn.Module):
    """Input layer, position embedding and blocks.

    ``checkpoint_blocks`` trades time for memory in training.
    """

    def __init__(self, config: TorsoConfig, in_channels: int) -> None:
        super().__init__()
        self.torso_config = config
        self.checkpoint_blocks = False
        self.input_layer = nn.Linear(in_channels, config.width)
        self.blocks = nn.ModuleList(make_block(config, i) for i in range(config.num_blocks))

    @property
    def torso_dtype(self) -> torch.dtype:
        return torso_dtype([self.blocks])

    def cast_torso(self, dtype: torch.dtype) -> None:
        """Run the blocks in ``dtype``; input and output layers stay as they are."""
        cast_torso([self.blocks], dtype)

    @property
    def plan_key(self) -> tuple[object, ...]:
        """Networks of equal keys can share a plan."""
        c = self.torso_config
        return (c.block, c.attention, c.window, c.conv_kernel)

    def plan(self, voxels: SparseVoxels) -> TorsoPlan:
        """Build the plans of ``voxels``, for all blocks (and for all networks over the same voxels)."""
        c = self.torso_config
        attention: tuple[Plan, ...] = ()
        if c.block != "convolution" and c.attention == "full":
            attention = (SequencePlan.from_cu_seqlens(voxels.cu_seqlens),)
        elif c.block != "convolution":
            attention = tuple(WindowPlan.build(voxels.coords, c.window, s) for s in (0, c.window // 2))
        neighbors = None
        if c.block != "attention":
            neighbors = neighbor_plan(voxels.coords, 3 if c.conv_kernel == "cube" else "cross")
        return TorsoPlan(attention, neighbors)

    def torso(self, voxels: SparseVoxels, plan: TorsoPlan | None) -> Tensor:
        """[N, Cin] → [N, width], in the torso's dtype."""
        plan = self.plan(voxels) if plan is None else plan
        h = precisely(self.input_layer, voxels.feats)
        h = h + absolute_position_embedding(voxels.coords[:, 1:], h.shape[1]).to(h.dtype)
        h = h.to(self.torso_dtype)
        num_attention = 0
        for block in self.blocks:
            if isinstance(block, TransformerBlock):
                arg: Plan | NeighborPlan | None = plan.attention[num_attention % len(plan.attention)]
                num_attention += 1
            else:
                arg = plan.neighbors
            if self.checkpoint_blocks and torch.is_grad_enabled():
                h = checkpoint(block, h, arg, use_reentrant=False)
            else:
                h = block(h, arg)
        return h


def make_block(config: TorsoConfig, index: int) -> nn.Module:
    c = config
    if c.block == "convolution" or (c.block == "alternating" and index % 2):
        return SparseResBlock(c.width, c.width, kernel=3 if c.conv_kernel == "cube" else "cross")
    return TransformerBlock(c.width, c.num_heads, c.mlp_ratio, c.qk_rms_norm, c.attention_backend)
