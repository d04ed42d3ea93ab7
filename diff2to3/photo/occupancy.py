"""OccupancyFlow: which voxels of the photo frame the object's surface crosses, as a flow from noise.

    noisy occupancy [B, 1, 32, 32, 32] ─fold 2³─▶ 16³ ─▶ 8³ (attention with the photo's tokens) ─▶ 16³ ─▶ logits
    photo lifted at its camera ────────────────────┘──────┘

Occupancy is ±1, and z_t = (1 - t) z_0 + t ε as everywhere (P3.3). The network gives the probability p that a voxel is
occupied. For ±1 data the mean of z_0 given z_t is 2p - 1, so the velocity of the flow is u = (z_t - (2p - 1)) / t, and
cross-entropy on p has the same minimum as the squared error of u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.photo.encoder import PhotoFeatures
from diff2to3.photo.frustum import (
    fold,
    project_points,
    sample_frustum,
    sample_plane,
    to_cube,
    unfold,
    voxel_centers,
)
from diff2to3.photo.layers import ChannelNorm, TokenBlock, VolumeBlock

#: Least time that velocities are divided by.
_MIN_TIME = 1e-4


@dataclass(frozen=True)
class OccupancyFlowConfig:
    """Sizes of :class:`OccupancyFlow`.

    resolution        R of the grid
    fine_width, coarse_width  channels at R/2 and at R/4
    num_coarse        blocks at R/4 before the attention, and as many after it
    num_attention     attention blocks at R/4
    plane_channels, frustum_channels, token_channels  of the photo's features
    """

    resolution: int = 32
    fine_width: int = 32
    coarse_width: int = 112
    num_coarse: int = 2
    num_attention: int = 1
    num_heads: int = 4
    time_width: int = 128
    plane_channels: int = 32
    frustum_channels: int = 6
    token_channels: int = 224

    def __post_init__(self) -> None:
        if self.resolution < 4 or self.resolution % 4:
            raise ValueError(f"resolution: expected a multiple of 4, got {self.resolution}")
        if self.coarse_width % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide {self.coarse_width}")


@dataclass(frozen=True)
class LiftedPhoto:
    """A photo's features on the voxels; the same for all steps of sampling.

    fine    [B, C, R/2, R/2, R/2]
    coarse  [B, C', R/4, R/4, R/4]
    where   [B, 6, R/2, R/2, R/2]: position in the frame, and (u, v, d) in the photo
    tokens  [B, L, W]
    """

    fine: Tensor
    coarse: Tensor
    where: Tensor
    tokens: Tensor

    def kept(self, keep: Tensor) -> LiftedPhoto:
        """With nothing of the photo where ``keep`` [B] is 0: the unconditional input."""
        k = keep.to(self.fine.dtype)
        volume = k[:, None, None, None, None]
        where = torch.cat([self.where[:, :3], self.where[:, 3:] * volume], 1)
        return LiftedPhoto(
            self.fine * volume, self.coarse * volume, where, self.tokens * k[:, None, None].to(self.tokens)
        )


class OccupancyFlow(nn.Module):
    """Noisy occupancy, time and the lifted photo → logits of the clean occupancy."""

    def __init__(self, config: OccupancyFlowConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or OccupancyFlowConfig()
        fine, coarse = c.fine_width, c.coarse_width
        self.time_layer = nn.Sequential(
            nn.Linear(64, c.time_width), nn.SiLU(), nn.Linear(c.time_width, c.time_width), nn.SiLU()
        )
        lifted = c.frustum_channels + c.plane_channels
        self.input_layer = nn.Conv3d(8 + 3 * 8 + lifted + 4 + 6, fine, 1)
        self.fine_down = nn.ModuleList(VolumeBlock(fine, c.time_width) for _ in range(2))
        self.to_coarse = nn.Conv3d(fine, coarse, 2, stride=2)
        self.lifted_layer = nn.Conv3d(lifted + 1, coarse, 1)
        self.coarse_blocks = nn.ModuleList(VolumeBlock(coarse, c.time_width) for _ in range(2 * c.num_coarse))
        self.positions = nn.Parameter(torch.zeros(1, (c.resolution // 4) ** 3, coarse))
        nn.init.normal_(self.positions, std=0.02)
        self.token_blocks = nn.ModuleList(
            TokenBlock(coarse, c.num_heads, c.token_channels) for _ in range(c.num_attention)
        )
        self.from_coarse = nn.Conv3d(coarse, fine, 1)
        self.fine_up = nn.ModuleList(VolumeBlock(fine, c.time_width) for _ in range(2))
        self.out_norm = ChannelNorm(fine)
        self.out_layer = nn.Conv3d(fine, 8, 3, padding=1)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.constant_(self.out_layer.bias, -2.5)  # type: ignore[arg-type]  # about 7 % of voxels are occupied

    def lift(self, features: PhotoFeatures, rgba: Tensor, elevations: Tensor, focals: Tensor) -> LiftedPhoto:
        """The photo on the voxels, at the cameras: radians [B] and focal lengths over the crop's side [B].

        At every voxel of R³: alpha (the visual hull), how likely the first surface is at its depth, and how likely it
        is in front of it. At R/2 and R/4: the encoder's features and the colour.
        """
        side, device = self.config.resolution, rgba.device
        bins = features.depth.shape[1]
        likely = features.depth.float().softmax(1)
        surface = torch.stack([likely * (bins / 4), likely.cumsum(1)], 1)
        seen = project_points(voxel_centers(side, device), elevations, focals)
        hull = sample_plane(rgba[:, 3:], seen, outside="zeros")
        each = fold(to_cube(torch.cat([hull, sample_frustum(surface, seen)], 1)))

        points = voxel_centers(side // 2, device)
        seen = project_points(points, elevations, focals)
        colors = sample_plane(rgba, seen, outside="zeros")
        parts = [sample_frustum(features.frustum, seen), sample_plane(features.plane, seen), colors]
        fine = torch.cat([each, to_cube(torch.cat(parts, 1))], 1)
        position = (2 * points.T)[None].expand(len(seen), -1, -1)
        where = to_cube(torch.cat([position, seen.transpose(1, 2) * seen.new_tensor([1, 1, 2])[:, None]], 1))

        seen = project_points(voxel_centers(side // 4, device), elevations, focals)
        alpha = sample_plane(rgba[:, 3:], seen, outside="zeros")
        parts = [sample_frustum(features.frustum, seen), sample_plane(features.plane, seen), alpha]
        return LiftedPhoto(fine, to_cube(torch.cat(parts, 1)), where, features.tokens)

    def forward(self, noisy: Tensor, time: Tensor, photo: LiftedPhoto) -> Tensor:
        """noisy [B, 1, R, R, R], time [B] in [0, 1] → logits [B, 1, R, R, R], float32."""
        c = self.config
        t = self.time_layer(time_features(time))
        h = torch.cat([fold(noisy), photo.fine, photo.where], 1)
        h = self.input_layer(h.contiguous(memory_format=torch.channels_last_3d))
        for block in self.fine_down:
            h = block(h, t)
        skip, h = h, self.to_coarse(h) + self.lifted_layer(photo.coarse)
        for block in self.coarse_blocks[: c.num_coarse]:
            h = block(h, t)
        tokens = h.flatten(2).transpose(1, 2) + self.positions
        for block in self.token_blocks:
            tokens = block(tokens, photo.tokens)
        h = to_cube(tokens.transpose(1, 2)).contiguous(memory_format=torch.channels_last_3d)
        for block in self.coarse_blocks[c.num_coarse :]:
            h = block(h, t)
        h = F.interpolate(self.from_coarse(h), scale_factor=2) + skip
        for block in self.fine_up:
            h = block(h, t)
        return unfold(self.out_layer(F.silu(self.out_norm(h))).float())


def time_features(time: Tensor) -> Tensor:
    """Sines and cosines of time [B] at 32 frequencies from 1 to 1000: [B, 64]."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), 32, device=time.device))
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def expected(logits: Tensor) -> Tensor:
    """The mean of ±1 occupancy."""
    return 2 * logits.sigmoid() - 1


def velocity(noisy: Tensor, logits: Tensor, time: Tensor) -> Tensor:
    """u = (z_t - E[z_0 | z_t]) / t; time [B]."""
    t = time.clamp(min=_MIN_TIME).view(-1, 1, 1, 1, 1)
    return (noisy - expected(logits)) / t
