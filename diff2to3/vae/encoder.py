"""Voxel features to latents: the encoder of the 2to3-VAE (P3.1), and with 1024 inputs of TRELLIS's."""

from __future__ import annotations

from torch import nn

from diff2to3.nn.precision import precisely
from diff2to3.nn.transformer import final_norm, xavier_linears, zero_parameters
from diff2to3.types import SparseVoxels
from diff2to3.vae.config import EncoderConfig
from diff2to3.vae.posterior import Posterior
from diff2to3.vae.torso import Torso, TorsoPlan


class Encoder(Torso):
    """Features [N, in_channels] on active voxels → the posterior of latents [N, latent_channels] on the
    same.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, config.in_channels)
        self.config = config
        self.out_layer = nn.Linear(config.width, 2 * config.latent_channels)
        xavier_linears(self)
        zero_parameters(self.out_layer)
        if config.linear_path:
            self.linear_path = nn.Linear(config.in_channels, 2 * config.latent_channels)

    def forward(self, voxels: SparseVoxels, plan: TorsoPlan | None = None) -> Posterior:
        """``plan``: of :meth:`plan`, where the same voxels are encoded or decoded again."""
        h = self.torso(voxels, plan).to(voxels.feats.dtype)
        out = precisely(self.out_layer, final_norm(h))
        if self.config.linear_path:
            out = out + precisely(self.linear_path, voxels.feats)
        mean, logvar = out.chunk(2, -1)
        return Posterior(mean, logvar)
