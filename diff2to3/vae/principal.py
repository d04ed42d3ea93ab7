"""The latents of a trained 2to3-VAE in their principal axes.

Noise of a flow model is as strong in every direction of the latents. Colours are not: along the grey axis they vary
five times as much as along green to magenta, and a little noise that is left turns grey objects into confetti. In
principal axes, each normalised by its own deviation, every direction has the same ratio of signal to noise at every
time. What the autoencoder computes is unchanged: the rotation is multiplied into the layers that give and take
latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder


def principal_axes(latents: Tensor) -> Tensor:
    """The matrix [C, C] that latents [N, C] are multiplied by from the right: each channel over its deviation, then the
    eigenvectors of the correlations, smallest eigenvalue first.

    Raises:
        ValueError: fewer rows than channels, or a channel that does not vary.
    """
    rows = latents.double()
    if rows.ndim != 2 or len(rows) <= rows.shape[1]:
        raise ValueError(f"latents: expected [N, C] with N above C, got {list(latents.shape)}")
    deviation = rows.std(0)
    if not bool((deviation > 0).all()):
        raise ValueError("latents: a channel does not vary")
    _, axes = torch.linalg.eigh(torch.cov(((rows - rows.mean(0)) / deviation).T))
    # an eigenvector's sign is arbitrary: its largest component is positive
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign() / deviation[:, None]


@torch.no_grad()
def turn_latents(encoder: Encoder, decoder: Decoder, axes: Tensor) -> None:
    """Multiply ``axes`` [C, C] into the encoder's means and its inverse into the decoder, in place.

    The posterior's variances stay those of the old channels: turning leaves no diagonal of variances a diagonal, and
    nothing but further training of the autoencoder reads them.
    """
    channels = encoder.config.latent_channels
    if axes.shape != (channels, channels):
        raise ValueError(f"axes: expected [{channels}, {channels}], got {list(axes.shape)}")
    inverse = torch.linalg.inv(axes.double())
    for name in ("out_layer", "linear_path"):
        layer = getattr(encoder, name, None)
        if isinstance(layer, nn.Linear):
            layer.weight[:channels] = (axes.double().T @ layer.weight[:channels].double()).to(layer.weight)
            layer.bias[:channels] = (layer.bias[:channels].double() @ axes.double()).to(layer.bias)
    for name in ("input_layer", "linear_path"):
        layer = getattr(decoder, name, None)
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(layer.weight.double() @ inverse.T)
