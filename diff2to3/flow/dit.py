"""The baseline's velocity networks (TRELLIS, section 3.4; the paper's Exp 1): time modulates, the condition
is cross-attended, positions are embedded absolutely.

    StructureDiT  dense latents [B, C, r, r, r] ─patches─▶ tokens ─blocks─▶ tokens ─unpatch─▶ velocity
    LatentDiT     sparse latents [N, C] ─residual convolutions, 2³ patches─▶ tokens ─blocks─▶ tokens
                  ─mirror─▶ velocity

Parameter names and shapes are those of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diff2to3.flow.config import DiTConfig, LatentDiTConfig
from diff2to3.flow.pyramid import Level, ascend, build_levels, descend, input_blocks, output_blocks
from diff2to3.nn.attention import AttentionHooks
from diff2to3.nn.embeddings import TimestepEmbedder, absolute_position_embedding
from diff2to3.nn.precision import cast_torso, precisely, torso_dtype
from diff2to3.nn.sequences import SequencePlan
from diff2to3.nn.transformer import (
    ModulatedCrossBlock,
    final_norm,
    modulation,
    xavier_linears,
    zero_parameters,
)
from diff2to3.types import SparseVoxels


@dataclass(frozen=True)
class TokenPlan:
    """Which token sees which: within a batch item, and in its condition. batch_index is None for B = 1."""

    self_attention: SequencePlan
    cross_attention: SequencePlan
    batch_index: Tensor | None

    def with_context(self, cond_length: int) -> TokenPlan:
        """The same tokens, conditions of another length."""
        lengths = self.self_attention.lengths_q
        device = self.self_attention.varlen.cu_q.device
        cross = SequencePlan.from_lengths(lengths, [cond_length] * len(lengths), device=device)
        return replace(self, cross_attention=cross)


class DiT(nn.Module):
    """What both networks share: the time embedding and the blocks."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.t_embedder = TimestepEmbedder(config.width)
        if config.share_modulation:
            self.adaLN_modulation = modulation(config.width, 6)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.num_blocks))

    def initialize(self, out_layer: nn.Linear) -> None:
        """TRELLIS's initialisation: the velocity is 0, and every block the identity, at the start."""
        xavier_linears(self)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation." in name:
                nn.init.zeros_(parameter)
        zero_parameters(out_layer)

    def torso_modules(self) -> list[nn.Module]:
        return [self.blocks]

    @property
    def torso_dtype(self) -> torch.dtype:
        return torso_dtype(self.torso_modules())

    def cast_torso(self, dtype: torch.dtype) -> None:
        """Run the blocks in ``dtype``; time embedding, input and output layers stay as they are."""
        cast_torso(self.torso_modules(), dtype)

    def run_blocks(
        self,
        x: Tensor,
        time: Tensor,
        cond: Tensor,
        plan: TokenPlan,
        cross_hooks: dict[int, AttentionHooks] | None,
    ) -> Tensor:
        """x [T, D], time [B, D] → [T, D]. cond [B, L, C] is packed. Hooks: block number → hooks."""
        if self.config.share_modulation:
            time = self.adaLN_modulation(time)
        time, context = time.to(x.dtype), cond.flatten(0, 1).to(x.dtype)
        for i, block in enumerate(self.blocks):
            args = (x, time, context, plan.self_attention, plan.cross_attention, plan.batch_index)
            hooks = (cross_hooks or {}).get(i)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *args, hooks, use_reentrant=False)
            else:
                x = block(*args, hooks)
        return x


def make_block(c: DiTConfig) -> ModulatedCrossBlock:
    return ModulatedCrossBlock(
        c.width,
        c.cond_channels,
        c.num_heads,
        c.mlp_ratio,
        qk_rms_norm=c.qk_rms_norm,
        qk_rms_norm_cross=c.qk_rms_norm_cross,
        share_modulation=c.share_modulation,
        backend=c.attention_backend,
    )


def check_condition(cond: Tensor, batch_size: int, channels: int) -> None:
    if cond.ndim != 3 or cond.shape[0] != batch_size or cond.shape[2] != channels:
        raise ValueError(f"cond: expected [{batch_size}, L, {channels}], got {list(cond.shape)}")


class StructureDiT(DiT):
    """Velocity of the dense occupancy latents."""

    pos_emb: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        c = config
        volume = c.patch_size**3
        self.input_layer = nn.Linear(c.in_channels * volume, c.width)
        self.out_layer = nn.Linear(c.width, c.out_channels * volume)
        axis = torch.arange(c.resolution // c.patch_size)
        cells = torch.cartesian_prod(axis, axis, axis).reshape(-1, 3)
        self.register_buffer("pos_emb", absolute_position_embedding(cells, c.width))
        self.initialize(self.out_layer)

    def plan(self, batch_size: int, cond_length: int, device: torch.device) -> TokenPlan:
        """For a batch of grids and conditions of one length; reusable over all steps."""
        tokens = (self.config.resolution // self.config.patch_size) ** 3
        lengths, context = [tokens] * batch_size, [cond_length] * batch_size
        batch_index = None
        if batch_size > 1:
            batch_index = torch.arange(batch_size, device=device).repeat_interleave(tokens)
        return TokenPlan(
            SequencePlan.from_lengths(lengths, device=device),
            SequencePlan.from_lengths(lengths, context, device=device),
            batch_index,
        )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: Tensor,
        plan: TokenPlan | None = None,
        cross_hooks: dict[int, AttentionHooks] | None = None,
    ) -> Tensor:
        """latents [B, C, r, r, r], timestep [B] in [0, 1], cond [B, L, cond_channels] → velocity as
        latents.
        """
        c, batch = self.config, latents.shape[0]
        if latents.shape[1:] != (c.in_channels, *(c.resolution,) * 3):
            raise ValueError(
                f"latents: expected [B, {c.in_channels}, {c.resolution}, {c.resolution}, {c.resolution}], "
                f"got {list(latents.shape)}"
            )
        check_condition(cond, batch, c.cond_channels)
        plan = plan or self.plan(batch, cond.shape[1], latents.device)
        x = precisely(self.input_layer, to_tokens(latents, c.patch_size)) + self.pos_emb
        x = x.flatten(0, 1).to(self.torso_dtype)
        x = self.run_blocks(x, self.t_embedder(timestep), cond, plan, cross_hooks).to(latents.dtype)
        x = precisely(self.out_layer, final_norm(x)).unflatten(0, (batch, -1))
        return to_grid(x, c.patch_size, c.resolution // c.patch_size)


def to_tokens(grid: Tensor, p: int) -> Tensor:
    """[B, C, p X, p Y, p Z] → [B, X Y Z, C p³], channel slowest."""
    b, c, x, y, z = grid.shape
    cells = grid.reshape(b, c, x // p, p, y // p, p, z // p, p)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * p**3)


def to_grid(tokens: Tensor, p: int, size: int) -> Tensor:
    """The inverse of :func:`to_tokens` for a cube of ``size``³ tokens."""
    cells = tokens.reshape(tokens.shape[0], size, size, size, -1, p, p, p)
    return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(tokens.shape[0], -1, *(p * size,) * 3)


@dataclass(frozen=True)
class LatentPlan:
    """All that depends on coordinates only: levels from voxels to tokens, token coordinates, attention."""

    levels: tuple[Level, ...]
    coords: Tensor
    tokens: TokenPlan

    def with_context(self, cond_length: int) -> LatentPlan:
        """The same voxels, conditions of another length."""
        return replace(self, tokens=self.tokens.with_context(cond_length))


class LatentDiT(DiT):
    """Velocity of the structured latents on active voxels."""

    config: LatentDiTConfig

    def __init__(self, config: LatentDiTConfig) -> None:
        super().__init__(config)
        c = config
        widths = [*c.io_channels, c.width]
        self.input_layer = nn.Linear(c.in_channels, widths[0])
        self.input_blocks = input_blocks(widths, c.num_io_blocks, c.width, c.reduce)
        self.out_blocks = output_blocks(widths, c.num_io_blocks, c.width, c.skip_connection)
        self.out_layer = nn.Linear(widths[0], c.out_channels)
        self.initialize(self.out_layer)

    def torso_modules(self) -> list[nn.Module]:
        return [self.input_blocks, self.blocks, self.out_blocks]

    def plan(self, voxels: SparseVoxels, cond_length: int) -> LatentPlan:
        """For these voxels and conditions of one length; reusable over all steps and both guidance passes."""
        levels, coords = build_levels(voxels.coords, len(self.config.io_channels), voxels.batch_size)
        batch_index = levels[-1].batch_index
        lengths = torch.bincount(coords[:, 0], minlength=voxels.batch_size).tolist()
        context = [cond_length] * voxels.batch_size
        tokens = TokenPlan(
            SequencePlan.from_lengths(lengths, device=coords.device),
            SequencePlan.from_lengths(lengths, context, device=coords.device),
            batch_index,
        )
        return LatentPlan(levels, coords, tokens)

    def forward(
        self,
        latents: SparseVoxels,
        timestep: Tensor,
        cond: Tensor,
        plan: LatentPlan | None = None,
        cross_hooks: dict[int, AttentionHooks] | None = None,
    ) -> Tensor:
        """latents [N, C] on voxels, timestep [B] in [0, 1], cond [B, L, cond_channels] → velocity [N, C']."""
        check_condition(cond, latents.batch_size, self.config.cond_channels)
        plan = plan or self.plan(latents, cond.shape[1])
        embedded = self.t_embedder(timestep)
        dtype = self.torso_dtype
        time = embedded.to(dtype)
        h = precisely(self.input_layer, latents.feats).to(dtype)
        h, skips = descend(self.input_blocks, h, time, plan.levels)
        h = h + absolute_position_embedding(plan.coords[:, 1:], h.shape[1]).to(dtype)
        h = self.run_blocks(h, embedded, cond, plan.tokens, cross_hooks)
        h = ascend(self.out_blocks, h, skips, time, plan.levels, self.config.skip_connection)
        return precisely(self.out_layer, final_norm(h).to(latents.feats.dtype))
