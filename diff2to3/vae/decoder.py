"""Latents to Gaussians: the decoder of the 2to3-VAE (P3.3), which is TRELLIS's."""

from __future__ import annotations

from torch import Tensor, nn

from diff2to3.nn.precision import precisely
from diff2to3.nn.transformer import final_norm, xavier_linears, zero_parameters
from diff2to3.types import Gaussians, SparseVoxels
from diff2to3.vae.config import DecoderConfig
from diff2to3.vae.gaussian_head import (
    RawGaussians,
    num_raw_channels,
    offset_perturbation,
    split_raw,
    to_gaussians,
)
from diff2to3.vae.torso import Torso, TorsoPlan


class Decoder(Torso):
    """Latents [N, latent_channels] on active voxels → Gaussians, one set a batch item."""

    offset_perturbation: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, config.latent_channels)
        self.config = config
        channels = num_raw_channels(config.gaussians)
        self.out_layer = nn.Linear(config.width, channels)
        xavier_linears(self)
        zero_parameters(self.out_layer)
        if config.linear_path:
            self.linear_path = nn.Linear(config.latent_channels, channels)
        self.register_buffer("offset_perturbation", offset_perturbation(config.gaussians))

    def raw(self, latents: SparseVoxels, plan: TorsoPlan | None = None) -> RawGaussians:
        """The parameters before activation."""
        h = self.torso(latents, plan).to(latents.feats.dtype)
        out = precisely(self.out_layer, final_norm(h))
        if self.config.linear_path:
            out = out + precisely(self.linear_path, latents.feats)
        return split_raw(out, self.config.gaussians)

    def forward(self, latents: SparseVoxels, plan: TorsoPlan | None = None) -> list[Gaussians]:
        """``plan``: of :meth:`plan`, where the same voxels are encoded or decoded again."""
        raw = self.raw(latents, plan)
        return to_gaussians(raw, latents, self.offset_perturbation, self.config.gaussians)
