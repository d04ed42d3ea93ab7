"""Raw network outputs to Gaussians, all voxels at once (P3.3; TRELLIS, appendix A)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.vae.config import GaussianConfig

#: Raw channels of one Gaussian, in the order in which a voxel's output holds them (all offsets first, …).
FIELDS = (("offsets", 3), ("colors", 3), ("scales", 3), ("quats", 4), ("opacities", 1))


@dataclass(frozen=True)
class RawGaussians:
    """Raw outputs times their gains, [N, K, ·] for K Gaussians on each of N voxels."""

    offsets: Tensor
    colors: Tensor
    scales: Tensor
    quats: Tensor
    opacities: Tensor


def num_raw_channels(config: GaussianConfig) -> int:
    return config.per_voxel * sum(size for _, size in FIELDS)


def split_raw(raw: Tensor, config: GaussianConfig) -> RawGaussians:
    """[N, 14 K] → named parts."""
    sizes = [config.per_voxel * size for _, size in FIELDS]
    parts = [
        part.unflatten(1, (config.per_voxel, size))
        for part, (_, size) in zip(raw.split(sizes, 1), FIELDS, strict=True)
    ]
    gains = (
        config.means_gain, config.colors_gain, config.scales_gain, config.quats_gain, config.opacities_gain
    )  # fmt: skip
    return RawGaussians(
        *(part if gain == 1 else part * gain for part, gain in zip(parts, gains, strict=True))
    )


def offset_perturbation(config: GaussianConfig) -> Tensor:
    """atanh((2 h_k − 1) / reach) of Hammersley points h_k in [0, 1)³: [K, 3].

    Raw offsets of 0 then fill the box.
    """
    points = [hammersley(k, config.per_voxel) for k in range(config.per_voxel)]
    return torch.tensor([[math.atanh((2 * x - 1) / config.reach) for x in point] for point in points])


def hammersley(index: int, count: int) -> tuple[float, float, float]:
    """Point ``index`` of ``count``: (i/n, radical inverses in base 2 and 3)."""
    return index / count, radical_inverse(2, index), radical_inverse(3, index)


def radical_inverse(base: int, number: int) -> float:
    """The digits of ``number`` mirrored at the point."""
    value, weight = 0.0, 1.0 / base
    while number > 0:
        number, digit = divmod(number, base)
        value += digit * weight
        weight /= base
    return value


def to_gaussians(
    raw: RawGaussians, voxels: SparseVoxels, perturbation: Tensor, config: GaussianConfig
) -> list[Gaussians]:
    """One Gaussians a batch item; K rows a voxel, in the voxels' order.

    mean = centre + reach / (2 R) · tanh(offset + perturbation)
    scale = √(softplus(raw + softplus⁻¹(scale_bias))² + min_scale²)
    quaternion = normalised raw + (1, 0, 0, 0);  opacity = sigmoid(raw + logit(opacity_bias));  SH degree 0
    """
    offsets = raw.offsets + perturbation if config.spread_offsets else raw.offsets
    half_box = 0.5 * config.reach / voxels.resolution
    centers = (voxels.coords[:, 1:].to(offsets.dtype) + 0.5) / voxels.resolution - 0.5
    means = centers[:, None] + half_box * torch.tanh(offsets)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0], device=raw.quats.device, dtype=raw.quats.dtype)
    quats = F.normalize(raw.quats + identity, dim=-1)
    scales = (scale_of(raw.scales, config).square() + config.min_scale**2).sqrt()
    logit = math.log(config.opacity_bias / (1 - config.opacity_bias))
    opacities = torch.sigmoid(raw.opacities[..., 0] + logit)
    everything = (means, quats, scales, opacities, raw.colors[:, :, None])
    sizes = [config.per_voxel * n for n in voxels.cu_seqlens.diff().tolist()]
    items = zip(*(x.flatten(0, 1).split(sizes) for x in everything), strict=True)
    return [Gaussians(*item) for item in items]


def scale_of(raw: Tensor, config: GaussianConfig) -> Tensor:
    """Standard deviations before the floor."""
    if config.scale_activation == "exp":
        return torch.exp(raw + math.log(config.scale_bias))
    inverse = config.scale_bias + math.log(-math.expm1(-config.scale_bias))
    return F.softplus(raw + inverse)
