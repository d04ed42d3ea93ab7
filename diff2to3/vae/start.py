"""Where training begins: latents that carry colour and surface point straight to the Gaussians.

Without it the blocks must first learn to pass colours on, and collapse them onto one axis on the way.
"""

from __future__ import annotations

import math

import torch

from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.gaussian_head import FIELDS

#: SH degree 0: colour = 0.5 + Y0 · sh.
Y0 = 0.28209479177387814


def start_linear_paths(
    encoder: Encoder, decoder: Decoder, color: int, point: int, factor: float, spread: float = 0.6
) -> None:
    """Set the linear paths so that latents 0 to 2 are the mean colour and 3 to 5 the mean surface point.

    Args:
        color, point: the input channels where they begin: (colour - 0.5) · factor, and the offset from the voxel's
            centre in voxels · factor.
        factor: as above.
        spread: the share of the offsets' Hammersley spread that is kept: a surface is thinner than its box.

    Raises:
        ValueError: a network without a linear path, or fewer than 6 latent channels.
    """
    c, g = decoder.config.latent_channels, decoder.config.gaussians
    if not (encoder.config.linear_path and decoder.config.linear_path):
        raise ValueError("linear_path: the encoder and the decoder both need one")
    if c < 6:
        raise ValueError(f"latent_channels: expected at least 6 for a start from colours and points, got {c}")
    with torch.no_grad():
        weight = encoder.linear_path.weight
        weight[: 2 * c] = 0
        encoder.linear_path.bias[:c] = 0
        for i in range(3):
            weight[i, color + i] = 1
            weight[3 + i, point + i] = 1
        out = decoder.linear_path.weight.zero_()
        bias = decoder.linear_path.bias.zero_()
        first = 0
        for name, size in FIELDS:
            for k in range(g.per_voxel):
                row = first + k * size
                for axis in range(3):
                    if name == "colors":
                        out[row + axis, axis] = 1 / (factor * Y0 * g.colors_gain)
                    elif name == "offsets":  # d offset / d raw is reach / 2 voxels at 0
                        out[row + axis, 3 + axis] = 1 / (factor * 0.5 * g.reach * g.means_gain)
            if name == "offsets" and g.spread_offsets:
                bias[first : first + 3 * g.per_voxel] = (
                    (spread - 1) * decoder.offset_perturbation.flatten() / g.means_gain
                )
            first += g.per_voxel * size


def start_logvar(encoder: Encoder, logvar: float) -> None:
    """Begin with posteriors of this log-variance (0: as wide as the prior) whatever the input."""
    c = encoder.config.latent_channels
    if not -30 < logvar <= 2 or not math.isfinite(logvar):
        raise ValueError(f"logvar: expected a number from -30 to 2, got {logvar}")
    with torch.no_grad():
        encoder.out_layer.bias[c:] = logvar
        if encoder.config.linear_path:
            encoder.linear_path.weight[c:] = 0
            encoder.linear_path.bias[c:] = 0
