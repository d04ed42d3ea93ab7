"""The dense convolutional VAE of occupancy grids: 64³ ↔ 16³ × 8 at the published size (TRELLIS, section
3.3), 32³ ↔ 8³ × 8 at the mini preset's.

    occupancy [B, 1, R, R, R] ─▶ (fold) ─▶ blocks, halve, blocks, … ─▶ latents [B, C, r, r, r]
    latents ─▶ blocks, double, blocks, … ─▶ (unfold) ─▶ logits [B, 1, R, R, R]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.nn.precision import cast_torso, precisely, torso_dtype
from diff2to3.nn.transformer import LayerNorm
from diff2to3.vae.config import StructureConfig
from diff2to3.vae.posterior import Posterior


class ChannelLayerNorm(LayerNorm):
    """Layer norm over dimension 1 of [B, C, …]."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x.movedim(1, -1)).movedim(-1, 1)
        )  # in memory, channels last: convolutions like it


class GroupNorm(nn.GroupNorm):
    """Group norm in float32 whatever the input's dtype; returns that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        return super().forward(x.to(precise)).to(x.dtype)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelLayerNorm(channels), ChannelLayerNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halve the grid with a strided convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the grid: a convolution to 8 times the channels, which become the 2³ new cells."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return unfold_cells(self.conv(x), 2)


def fold_cells(x: Tensor, f: int) -> Tensor:
    """f³ neighbouring cells as channels: [B, C, R, R, R] → [B, C f³, R/f, R/f, R/f]; channel-major."""
    if any(size % f for size in x.shape[2:]):
        raise ValueError(f"x: expected a grid whose sides are multiples of {f}, got {list(x.shape[2:])}")
    cells = x.unflatten(4, (-1, f)).unflatten(3, (-1, f)).unflatten(2, (-1, f))  # [B, C, X, i, Y, j, Z, k]
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).movedim(-1, 1)


def unfold_cells(x: Tensor, f: int) -> Tensor:
    """The inverse of :func:`fold_cells`."""
    cells = x.unflatten(1, (-1, f, f, f)).permute(0, 5, 2, 6, 3, 7, 4, 1)  # [B, X, i, Y, j, Z, k, C]
    return cells.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class StructureNetwork(nn.Module):
    """What both halves share: the torso's dtype."""

    blocks: nn.ModuleList
    middle_block: nn.Sequential

    @property
    def torso_dtype(self) -> torch.dtype:
        return torso_dtype([self.blocks])

    def cast_torso(self, dtype: torch.dtype) -> None:
        """Run all but the input and output layers in ``dtype``."""
        cast_torso([self.blocks, self.middle_block], dtype)


def output_layer(config: StructureConfig, channels: int, out_channels: int) -> nn.Sequential:
    norm = ChannelLayerNorm(channels) if config.norm == "layer" else GroupNorm(32, channels)
    return nn.Sequential(norm, nn.SiLU(), nn.Conv3d(channels, out_channels, 3, padding=1))


def levels(config: StructureConfig, change: type[Downsample] | type[Upsample]) -> nn.ModuleList:
    """Residual blocks at every level, with a change of resolution between levels."""
    blocks = nn.ModuleList()
    for i, channels in enumerate(config.channels):
        blocks.extend(ResBlock(channels) for _ in range(config.num_res_blocks))
        if i + 1 < len(config.channels):
            blocks.append(change(channels, config.channels[i + 1]))
    return blocks


def middle(config: StructureConfig, channels: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(channels) for _ in range(config.num_middle_blocks)))


class StructureEncoder(StructureNetwork):
    """Occupancy [B, 1, R, R, R] → the posterior of latents [B, C, R/4, R/4, R/4] (with three levels)."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.config = config
        data_channels = config.data_channels * config.fold**3
        self.input_layer = nn.Conv3d(data_channels, config.channels[0], 3, padding=1)
        self.blocks = levels(config, Downsample)
        self.middle_block = middle(config, config.channels[-1])
        self.out_layer = output_layer(config, config.channels[-1], 2 * config.latent_channels)

    def forward(self, occupancy: Tensor) -> Posterior:
        h = precisely(self.input_layer, fold_cells(occupancy, self.config.fold)).to(self.torso_dtype)
        for block in self.blocks:
            h = block(h)
        h = self.middle_block(h).to(occupancy.dtype)
        mean, logvar = precisely(self.out_layer, h).chunk(2, 1)
        return Posterior(mean, logvar)


class StructureDecoder(StructureNetwork):
    """Latents [B, C, r, r, r] → occupancy logits [B, 1, 4 r, 4 r, 4 r] (with three levels)."""

    def __init__(self, config: StructureConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layer = nn.Conv3d(config.latent_channels, config.channels[0], 3, padding=1)
        self.middle_block = middle(config, config.channels[0])
        self.blocks = levels(config, Upsample)
        data_channels = config.data_channels * config.fold**3
        self.out_layer = output_layer(config, config.channels[-1], data_channels)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.middle_block(precisely(self.input_layer, latents).to(self.torso_dtype))
        for block in self.blocks:
            h = block(h)
        return unfold_cells(precisely(self.out_layer, h.to(latents.dtype)), self.config.fold)


def active_voxels(logits: Tensor, threshold: float = 0.0) -> Tensor:
    """Coordinates int32 [N, 4] (batch, x, y, z), sorted, of cells whose logit [B, 1, R, R, R] is above
    ``threshold``.
    """
    if logits.ndim != 5 or logits.shape[1] != 1:
        raise ValueError(f"logits: expected [B, 1, R, R, R], got {list(logits.shape)}")
    return torch.nonzero(logits[:, 0] > threshold).to(torch.int32)
