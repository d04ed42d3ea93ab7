"""Blocks of the photo encoder (2D) and of the occupancy flow (3D). Tensors are [B, C, ...], channels last in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalize_channels(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm over the channels of every position of [B, C, ...]."""
    last = (0, *range(2, x.ndim), 1)
    back = (0, x.ndim - 1, *range(1, x.ndim - 1))
    return F.layer_norm(x.permute(last), (x.shape[1],), weight, bias).permute(back)


class ChannelNorm(nn.Module):
    """:func:`normalize_channels` with a learnt gain and shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return normalize_channels(x, self.weight, self.bias)


class PlaneBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))) in 2D; the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class VolumeBlock(nn.Module):
    """The same in 3D; the time scales and shifts the first norm (adaLN)."""

    def __init__(self, channels: int, time_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(time_width, 2 * channels)
        for zero in (self.conv2.weight, self.modulation.weight, self.modulation.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time)[:, :, None, None, None].chunk(2, 1)
        h = self.conv1(F.silu(normalize_channels(x) * (1 + scale) + shift))
        return x + self.conv2(F.silu(self.norm2(h)))


class TokenBlock(nn.Module):
    """Pre-norm attention and MLP on tokens [B, L, C]; with ``context_channels`` keys and values of other tokens
    [B, M, context_channels] stand beside the tokens' own. Queries and keys are normalised. The identity at the start.
    """

    def __init__(self, channels: int, num_heads: int, context_channels: int = 0) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, channels // num_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.context: nn.Module | None = None
        if context_channels:
            self.context = nn.Sequential(
                nn.LayerNorm(context_channels), nn.Linear(context_channels, 2 * channels)
            )
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if self.context is not None and context is not None:
            more_k, more_v = self.context(context).chunk(2, -1)
            k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        q, k = (F.layer_norm(part, (self.head_width,)).to(v.dtype) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.mlp(self.mlp_norm(x))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
