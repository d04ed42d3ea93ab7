"""Sinusoidal embeddings of time and position, as in DiT and TRELLIS."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diff2to3.nn.precision import precisely

#: Networks take t in [0, 1]; the sinusoids see t times this.
TIME_SCALE = 1000.0
MAX_PERIOD = 10000.0


class TimestepEmbedder(nn.Module):
    """t in [0, 1] → width: sinusoids of 1000 t, then a two-layer MLP (DiT, Peebles and Xie 2023)."""

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """[B] → [B, width]. A float64 timestep is scaled in float64, then rounded once."""
        weight = next(self.mlp.parameters())
        scaled = (timestep * TIME_SCALE).to(torch.float32).to(weight.device)
        return precisely(self.mlp, sinusoids(scaled, self.num_frequencies))


def sinusoids(x: Tensor, channels: int) -> Tensor:
    """[B] → [B, channels]: cosines, then sines, of x · 10000^(-i / (channels/2)), in float32."""
    half = channels // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=x.device) / half
    angles = x[:, None].float() * exponents.exp()
    embedding = torch.cat([angles.cos(), angles.sin()], -1)
    return nn.functional.pad(embedding, (0, channels - 2 * half))


def absolute_position_embedding(coords: Tensor, channels: int) -> Tensor:
    """Positions [T, A] (any numbers) → [T, channels]: per axis sines, then cosines; zeros fill up.

    float32.
    """
    num_axes = coords.shape[1]
    count = channels // num_axes // 2
    exponents = torch.arange(count, dtype=torch.float32, device=coords.device) / count
    angles = coords[:, :, None].float() * (1.0 / MAX_PERIOD**exponents)
    embedding = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return nn.functional.pad(embedding, (0, channels - 2 * count * num_axes))
