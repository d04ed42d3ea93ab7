"""PhotoEncoder: a photo → features that can be lifted onto voxels, and the camera that took it.

    fine maps [B, 40, 32, 32], RGBA [B, 4, 64, 64] ─┐ 32² ─▶ 16² ─▶ 8² ─▶ tokens ─▶ camera
    coarse maps [B, 112, 16, 16] ───────────────────┼────────┘             │
    plane, frustum, depth at 32² ◀──────────────────┴──────────────────────┘ (a U-Net)

Depth is predicted as a distribution over bins along each pixel's ray, and features for each bin with it, so that
voxels can look up what was seen at their own depth ("lift, splat", Philion and Fidler 2020, read backwards).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.photo.frustum import DEPTH_REACH
from diff2to3.photo.layers import PlaneBlock, TokenBlock

#: Camera parameters are learnt as (value - mean) / deviation: elevation in radians, log of the focal length.
ELEVATION_MEAN, ELEVATION_DEVIATION = 0.3, 0.35
LOG_FOCAL_MEAN, LOG_FOCAL_DEVIATION = 0.8, 0.5
#: What a predicted camera is kept within: elevation in radians, log of the focal length.
ELEVATION_RANGE, LOG_FOCAL_RANGE = (-0.4, 1.3), (-0.2, 2.2)


@dataclass(frozen=True)
class PhotoEncoderConfig:
    """Sizes of :class:`PhotoEncoder`.

    fine_channels, coarse_channels  of the maps, at 1/8 and 1/16 of the photo's resolution
    resolution        side of the fine maps; of the coarse ones it is half
    widths            channels at the full, half and quarter side
    plane_channels    of the features at 32² that do not depend on depth
    frustum_channels  of the features of every bin of depth
    depth_bins        over [-DEPTH_REACH, DEPTH_REACH]
    """

    fine_channels: int = 40
    coarse_channels: int = 112
    resolution: int = 32
    widths: tuple[int, int, int] = (80, 160, 224)
    plane_channels: int = 32
    frustum_channels: int = 6
    depth_bins: int = 32
    num_heads: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # read from a file it is a list
        if self.resolution < 4 or self.resolution % 4:
            raise ValueError(f"resolution: expected a multiple of 4, got {self.resolution}")
        if len(self.widths) != 3 or any(width < 1 or width % self.num_heads for width in self.widths):
            raise ValueError(f"widths: expected three multiples of {self.num_heads} heads, got {self.widths}")


@dataclass(frozen=True)
class PhotoMaps:
    """What the encoder reads of B photos, cropped as the photo frame says.

    fine    [B, 40, 32, 32]  of the frozen image network at stride 8, divided by their deviation
    coarse  [B, 112, 16, 16] likewise at stride 16
    rgba    [B, 4, 64, 64]   premultiplied colour and alpha in [0, 1]
    """

    fine: Tensor
    coarse: Tensor
    rgba: Tensor

    @property
    def batch_size(self) -> int:
        return int(self.fine.shape[0])

    def mirrored(self) -> PhotoMaps:
        """Of the photos in a mirror. (Convolutional maps of a mirrored photo are nearly the mirrored maps.)"""
        return PhotoMaps(self.fine.flip(-1), self.coarse.flip(-1), self.rgba.flip(-1))


@dataclass(frozen=True)
class PhotoFeatures:
    """What the encoder says of B photos.

    plane    [B, C, 32, 32]      features of pixels
    frustum  [B, K, D, 32, 32]   features of pixels at D depths
    depth    [B, D, 32, 32]      logits over the depth of the first surface
    tokens   [B, L, W]           the whole photo
    camera   [B, 4]              normalised elevation and log focal length, and the logs of their expected errors
    """

    plane: Tensor
    frustum: Tensor
    depth: Tensor
    tokens: Tensor
    camera: Tensor

    def elevations(self) -> Tensor:
        """Predicted, radians [B]."""
        return (self.camera[:, 0] * ELEVATION_DEVIATION + ELEVATION_MEAN).clamp(*ELEVATION_RANGE)

    def focals(self) -> Tensor:
        """Predicted focal lengths over the crop's side [B]."""
        return (self.camera[:, 1] * LOG_FOCAL_DEVIATION + LOG_FOCAL_MEAN).clamp(*LOG_FOCAL_RANGE).exp()


class PhotoEncoder(nn.Module):
    """:class:`PhotoMaps` → :class:`PhotoFeatures`."""

    def __init__(self, config: PhotoEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or PhotoEncoderConfig()
        fine, half, quarter = c.widths
        side = c.resolution // 4
        self.input_layer = nn.Conv2d(c.fine_channels + 16 + 2, fine, 3, padding=1)
        self.fine_down = nn.ModuleList(PlaneBlock(fine) for _ in range(2))
        self.to_half = nn.Conv2d(fine, half, 2, stride=2)
        self.coarse_layer = nn.Conv2d(c.coarse_channels, half, 1)
        self.half_down = nn.ModuleList(PlaneBlock(half) for _ in range(2))
        self.to_quarter = nn.Conv2d(half, quarter, 2, stride=2)
        self.quarter_blocks = nn.ModuleList(PlaneBlock(quarter) for _ in range(2))
        self.positions = nn.Parameter(torch.zeros(1, side * side, quarter))
        nn.init.normal_(self.positions, std=0.02)
        self.token_blocks = nn.ModuleList(TokenBlock(quarter, c.num_heads) for _ in range(2))
        self.from_quarter = nn.Conv2d(quarter, half, 1)
        self.half_up = nn.ModuleList(PlaneBlock(half) for _ in range(2))
        self.from_half = nn.Conv2d(half, fine, 1)
        self.fine_up = nn.ModuleList(PlaneBlock(fine) for _ in range(2))
        self.out_sizes = [c.plane_channels, c.frustum_channels * c.depth_bins, c.depth_bins]
        self.out_layer = nn.Conv2d(fine, sum(self.out_sizes), 1)
        self.camera_head = nn.Sequential(
            nn.LayerNorm(quarter),
            nn.Linear(quarter, 32),
            nn.GELU(),
            nn.Flatten(1),
            nn.Linear(32 * side * side, 128),
            nn.GELU(),
            nn.Linear(128, 4),
        )
        nn.init.zeros_(self.camera_head[-1].weight)  # type: ignore[arg-type]

    def forward(self, maps: PhotoMaps) -> PhotoFeatures:
        c = self.config
        x = h_fine = self.descend(self.input_layer(self.pixels(maps)), self.fine_down)
        x = h_half = self.descend(self.to_half(x) + self.coarse_layer(maps.coarse), self.half_down)
        x = self.descend(self.to_quarter(x), self.quarter_blocks)
        tokens = x.flatten(2).transpose(1, 2) + self.positions
        for block in self.token_blocks:
            tokens = block(tokens)
        side = c.resolution // 4
        x = tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous(memory_format=torch.channels_last)
        x = self.descend(F.interpolate(self.from_quarter(x), scale_factor=2) + h_half, self.half_up)
        x = self.descend(F.interpolate(self.from_half(x), scale_factor=2) + h_fine, self.fine_up)
        plane, frustum, depth = self.out_layer(x).float().split(self.out_sizes, 1)
        camera = self.camera_head(tokens).float()
        return PhotoFeatures(
            plane, frustum.unflatten(1, (c.frustum_channels, c.depth_bins)), depth, tokens, camera
        )

    def pixels(self, maps: PhotoMaps) -> Tensor:
        """Fine maps, colour and alpha of 2² pixels each, and where in the crop they are: [B, 58, 32, 32]."""
        axis = torch.linspace(-1, 1, self.config.resolution, device=maps.fine.device)
        where = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None]
        where = where.expand(maps.batch_size, -1, -1, -1)
        x = torch.cat([maps.fine, F.pixel_unshuffle(maps.rgba * 2 - 1, 2), where], 1)
        return x.contiguous(memory_format=torch.channels_last)

    def descend(self, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


def camera_loss(features: PhotoFeatures, elevations: Tensor, focals: Tensor) -> Tensor:
    """Laplace negative log-likelihood of the true cameras, a photo: [B]."""
    wanted = torch.stack(
        [
            (elevations - ELEVATION_MEAN) / ELEVATION_DEVIATION,
            (focals.log() - LOG_FOCAL_MEAN) / LOG_FOCAL_DEVIATION,
        ],
        1,
    )
    spread = features.camera[:, 2:].clamp(-4, 2)
    return ((features.camera[:, :2] - wanted).abs() * torch.exp(-spread) + spread).mean(1)


def depth_loss(features: PhotoFeatures, depth: Tensor) -> Tensor:
    """Cross-entropy of the depth of the first surface, over the pixels that see one, a photo: [B].

    Args:
        depth: d of the pixels [B, 32, 32] (see :mod:`diff2to3.photo.frustum`); NaN where nothing is seen.
    """
    bins = features.depth.shape[1]
    seen = depth.isfinite()
    position = (depth.nan_to_num() / DEPTH_REACH + 1) / 2 * bins - 0.5
    position = position.clamp(0, bins - 1)
    low = position.floor().long()
    share = position - low
    likely = features.depth.log_softmax(1)
    at_low = likely.gather(1, low[:, None])[:, 0]
    at_high = likely.gather(1, (low + 1).clamp(max=bins - 1)[:, None])[:, 0]
    loss = -(at_low * (1 - share) + at_high * share) * seen
    return loss.sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)
