"""SMDiT (P3.2, figure 3): velocities of latents from latents and the condition image's tokens, jointly attended.

    voxels [N, C] ─residual convolutions, 2³ patches─▶ [M, D] ┐ double blocks ┐ single ┌▶ [M, D] ─mirror─▶ [N, C]
    image  [T, C p²] ─linear─────────────────────────▶ [T, D] ┘ (two streams) ┘ blocks └▶ dropped

    StructureSMDiT  the same on dense latents [B, C, r, r, r], whose patches are one linear layer (stage 1)
    LatentSMDiT     sparse latents on active voxels (stage 2)

Sequences of different lengths are packed, never padded; an item without image tokens is unconditional.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diff2to3.flow.blocks import NUM_PARTS, BlockPlan, DoubleStreamBlock, Rows, SingleStreamBlock
from diff2to3.flow.config import LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.dit import to_grid, to_tokens
from diff2to3.flow.marope import image_ids, marope_tables, voxel_ids
from diff2to3.flow.matching import precondition
from diff2to3.flow.pyramid import Level, ascend, build_levels, descend, input_blocks, output_blocks
from diff2to3.flow.tokens import ImageTokens, boundaries
from diff2to3.nn.attention import AttentionHooks
from diff2to3.nn.embeddings import TimestepEmbedder, absolute_position_embedding
from diff2to3.nn.items import mean_row_by_item
from diff2to3.nn.precision import cast_torso, precisely, torso_dtype
from diff2to3.nn.streams import JointPlan, pack_streams, unpack_streams
from diff2to3.nn.transformer import final_norm, modulation, xavier_linears, zero_parameters
from diff2to3.types import SparseVoxels

Hooks = dict[int, AttentionHooks]


@dataclass(frozen=True)
class JointTokens:
    """All that depends on positions only, for voxel tokens at ``coords`` [M, 4] and given image tokens.

    levels  the pyramid from voxels to tokens (sparse latents), finest first
    blocks  attention, rows and rotary tables
    """

    coords: Tensor
    levels: tuple[Level, ...]
    blocks: BlockPlan


class ImagePool(nn.Module):
    """Image tokens [T, D] → one vector an item [B, D]: 0 at the start, and for items without tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layer = nn.Linear(width, width)
        self.out_layer = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.input_layer(tokens))
        return self.out_layer(mean_row_by_item(hidden, cu_seqlens))


class SMDiT(nn.Module):
    """What both stages share: time, image tokens, positions and the blocks."""

    def __init__(self, config: SMDiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.checkpoint_blocks = False
        self.t_embedder = TimestepEmbedder(c.width)
        self.image_layer = nn.Linear(c.image_width, c.width)
        if c.pool_image:
            self.image_pool = ImagePool(c.width)
        if c.share_modulation:
            self.adaLN_modulation = modulation(c.width, NUM_PARTS)
        options = (c.width, c.num_heads, c.mlp_ratio, c.qk_rms_norm, c.share_modulation, c.attention_backend)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*options) for _ in range(c.num_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*options) for _ in range(c.num_single))

    def initialize(self, out_layer: nn.Linear) -> None:
        """As the baseline: the velocity is 0, and every block the identity, at the start."""
        xavier_linears(self)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "modulation." in name.lower():
                nn.init.zeros_(parameter)
        zero_parameters(out_layer)
        if self.config.pool_image:
            zero_parameters(self.image_pool.out_layer)

    def torso_modules(self) -> list[nn.Module]:
        return [self.double_blocks, self.single_blocks]

    @property
    def torso_dtype(self) -> torch.dtype:
        return torso_dtype(self.torso_modules())

    def cast_torso(self, dtype: torch.dtype) -> None:
        """Run the blocks in ``dtype``; time embedding, input and output layers stay as they are."""
        cast_torso(self.torso_modules(), dtype)

    def lay_out(self, coords: Tensor, levels: tuple[Level, ...], image: ImageTokens) -> JointTokens:
        """The plan for voxel tokens at ``coords`` (sorted by batch) and these image tokens."""
        c, batch_size = self.config, image.batch_size
        counts = torch.bincount(coords[:, 0], minlength=batch_size).tolist()
        joint = JointPlan.build(boundaries(counts, coords.device), image.cu_seqlens)
        rotary = None
        if c.position == "marope":
            ids = pack_streams(voxel_ids(coords), image_ids(image, c.grid), joint)
            rotary = marope_tables(ids, c.width // c.num_heads, c.rope_theta)
        single = batch_size == 1
        items = torch.arange(batch_size, device=coords.device)
        rows_i = torch.repeat_interleave(items, image.cu_seqlens.diff().long())
        voxels, both = coords[:, 0].long(), joint.batch_index
        of_voxels, of_image, of_both = (Rows(None if single else index) for index in (voxels, rows_i, both))
        return JointTokens(coords, levels, BlockPlan(joint, of_voxels, of_image, of_both, rotary))

    def see(self, image: ImageTokens) -> Tensor:
        """The embedded image tokens [T, D], which do not depend on the time."""
        c = self.config
        y = precisely(self.image_layer, image.feats)
        if c.embeds_positions:
            y = y + absolute_position_embedding(image_ids(image, c.grid), c.width).to(y.dtype)
        return y

    def modulators(self, timestep: Tensor, seen: Tensor, image: ImageTokens) -> Tensor:
        """timestep [B] and the image → what modulates the blocks [B, D]."""
        time = self.t_embedder(timestep)
        if self.config.pool_image:
            time = time + self.image_pool(seen, image.cu_seqlens)
        return time

    def run_blocks(
        self, x: Tensor, y: Tensor, time: Tensor, plan: JointTokens, hooks: Hooks | None = None
    ) -> Tensor:
        """Voxel tokens [M, D], image tokens [T, D] → voxel tokens. hooks: block number (double blocks first)."""
        c, dtype = self.config, self.torso_dtype
        if c.embeds_positions:
            x = x + absolute_position_embedding(voxel_ids(plan.coords), c.width).to(x.dtype)
        if c.share_modulation:
            time = self.adaLN_modulation(time)
        x, y, time, hooks = x.to(dtype), y.to(dtype), time.to(dtype), hooks or {}
        for i, block in enumerate(self.double_blocks):
            x, y = self.run(block, x, y, time, plan.blocks, hooks.get(i))
        both = pack_streams(x, y, plan.blocks.joint)
        for i, block in enumerate(self.single_blocks, len(self.double_blocks)):
            both = self.run(block, both, time, plan.blocks, hooks.get(i))
        return unpack_streams(both, plan.blocks.joint)[0]

    def run(self, block: nn.Module, *args: object) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def check(self, image: ImageTokens, batch_size: int) -> None:
        if image.batch_size != batch_size or image.channels != self.config.image_width:
            raise ValueError(
                f"image: expected {batch_size} items of {self.config.image_width} channels, "
                f"got {image.batch_size} of {image.channels}"
            )

    def check_lifted(self, lifted: Tensor, shape: tuple[int, ...]) -> None:
        if not self.config.lifted_channels:
            raise ValueError("lifted: this network takes no lifted features (lifted_channels is 0)")
        if lifted.shape != shape:
            raise ValueError(f"lifted: expected {list(shape)}, got {list(lifted.shape)}")


class StructureSMDiT(SMDiT):
    """Velocity of the dense occupancy latents."""

    def __init__(self, config: SMDiTConfig) -> None:
        super().__init__(config)
        volume = config.patch_size**3
        self.input_layer = nn.Linear(config.in_channels * volume, config.width)
        self.out_layer = nn.Linear(config.width, config.out_channels * volume)
        if config.lifted_channels:
            self.lifted_layer = nn.Linear(config.lifted_channels * volume, config.width, bias=False)
        self.initialize(self.out_layer)

    def plan(self, image: ImageTokens) -> JointTokens:
        """For a batch of grids with these images; reusable over all steps."""
        axis = torch.arange(self.config.grid, device=image.feats.device)
        items = torch.arange(image.batch_size, device=image.feats.device)
        coords = torch.cartesian_prod(items, axis, axis, axis).to(torch.int32)
        return self.lay_out(coords, (), image)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        image: ImageTokens,
        plan: JointTokens | None = None,
        hooks: Hooks | None = None,
        seen: Tensor | None = None,
        lifted: Tensor | None = None,
    ) -> Tensor:
        """latents [B, C, r, r, r], timestep [B] in [0, 1] → velocity as latents. ``seen``: ``see(image)``, where it is
        at hand. ``lifted`` [B, C', r, r, r]: what the image says about each cell, zeros for an item without one; None
        for no item with one.
        """
        c, batch = self.config, latents.shape[0]
        if latents.shape[1:] != (c.in_channels, *(c.resolution,) * 3):
            shape = f"[B, {c.in_channels}, {c.resolution}, {c.resolution}, {c.resolution}]"
            raise ValueError(f"latents: expected {shape}, got {list(latents.shape)}")
        self.check(image, batch)
        plan = plan or self.plan(image)
        seen = self.see(image) if seen is None else seen
        x = precisely(self.input_layer, to_tokens(latents, c.patch_size)).flatten(0, 1)
        if lifted is not None:
            self.check_lifted(lifted, (batch, c.lifted_channels, *latents.shape[2:]))
            x = x + precisely(self.lifted_layer, to_tokens(lifted, c.patch_size)).flatten(0, 1)
        time = self.modulators(timestep, seen, image)
        x = self.run_blocks(x, seen, time, plan, hooks).to(latents.dtype)
        x = precisely(self.out_layer, final_norm(x)).unflatten(0, (batch, -1))
        output = to_grid(x, c.patch_size, c.grid)
        if not c.precondition:
            return output
        return precondition(output, latents, timestep.to(latents.device).reshape(-1, 1, 1, 1, 1))


class LatentSMDiT(SMDiT):
    """Velocity of the structured latents on active voxels."""

    config: LatentSMDiTConfig

    def __init__(self, config: LatentSMDiTConfig) -> None:
        super().__init__(config)
        c = config
        self.kernel: int | str = 3 if c.io_kernel == "cube" else "cross"
        widths = [*c.io_channels, c.width]
        self.input_layer = nn.Linear(c.in_channels, widths[0])
        if c.lifted_channels:
            self.lifted_layer = nn.Linear(c.lifted_channels, widths[0], bias=False)
        if c.absolute:
            self.cell_embedding = nn.Embedding(c.patch_size**3, widths[0])
            nn.init.normal_(self.cell_embedding.weight, std=0.1)
        self.input_blocks = input_blocks(widths, c.num_io_blocks, c.width, c.reduce, self.kernel)
        self.out_blocks = output_blocks(widths, c.num_io_blocks, c.width, c.skip_connection, self.kernel)
        self.out_layer = nn.Linear(widths[0], c.out_channels)
        self.initialize(self.out_layer)

    def torso_modules(self) -> list[nn.Module]:
        return [*super().torso_modules(), self.input_blocks, self.out_blocks]

    def plan(self, voxels: SparseVoxels, image: ImageTokens) -> JointTokens:
        """For these voxels and images; reusable over all steps."""
        halvings = len(self.config.io_channels)
        levels, coords = build_levels(voxels.coords, halvings, voxels.batch_size, self.kernel)
        return self.lay_out(coords, levels, image)

    def forward(
        self,
        latents: SparseVoxels,
        timestep: Tensor,
        image: ImageTokens,
        plan: JointTokens | None = None,
        hooks: Hooks | None = None,
        seen: Tensor | None = None,
        lifted: Tensor | None = None,
    ) -> Tensor:
        """latents [N, C] on voxels, timestep [B] in [0, 1] → velocity [N, C'']. ``lifted`` [N, C']: what the image says
        about each voxel, zeros for an item without one; None for no item with one.
        """
        self.check(image, latents.batch_size)
        plan = plan or self.plan(latents, image)
        seen = self.see(image) if seen is None else seen
        embedded = self.modulators(timestep, seen, image)
        time = embedded.to(self.torso_dtype)
        h = precisely(self.input_layer, latents.feats)
        if lifted is not None:
            self.check_lifted(lifted, (len(h), self.config.lifted_channels))
            h = h + precisely(self.lifted_layer, lifted.to(h.dtype))
        if self.config.absolute:
            h = h + self.cell_embedding(cells(latents.coords, self.config.patch_size))
        h = h.to(self.torso_dtype)
        h, skips = descend(self.input_blocks, h, time, plan.levels)
        h = self.run_blocks(h, seen, embedded, plan, hooks)
        h = ascend(self.out_blocks, h, skips, time, plan.levels, self.config.skip_connection)
        output = precisely(self.out_layer, final_norm(h).to(latents.feats.dtype))
        if not self.config.precondition:
            return output
        t = torch.repeat_interleave(timestep.to(output.device), latents.cu_seqlens.diff().long())
        return precondition(output, latents.feats, t[:, None])


def cells(coords: Tensor, patch_size: int) -> Tensor:
    """Where in its patch every voxel of ``coords`` [N, 4] is: int64 [N] from 0 to patch_size³ - 1."""
    x, y, z = (coords[:, 1:].long() % patch_size).unbind(1)
    return (x * patch_size + y) * patch_size + z
