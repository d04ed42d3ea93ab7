"""Latents in their principal axes: uncorrelated, and the autoencoder computes what it did."""

import pytest
import torch

from diff2to3.types import SparseVoxels
from diff2to3.vae.config import DecoderConfig, EncoderConfig, GaussianConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.principal import principal_axes, turn_latents


def mixed(count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    grey = torch.randn(count, 1, generator=generator)
    return 2 + torch.cat([grey, grey, grey, 3 * grey], 1) + 0.2 * torch.randn(count, 4, generator=generator)


def test_turned_latents_are_uncorrelated_and_in_order() -> None:
    turned = mixed().double() @ principal_axes(mixed())
    covariance = torch.cov(turned.T)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-8
    assert bool((covariance.diag().diff() > 0).all())
    expected = torch.linalg.eigvalsh(torch.corrcoef(mixed().double().T))
    torch.testing.assert_close(covariance.diag(), expected)


@pytest.mark.parametrize("linear_path", [True, False])
def test_the_autoencoder_computes_what_it_did(linear_path: bool) -> None:
    torch.manual_seed(0)
    sizes = {"resolution": 8, "width": 8, "num_blocks": 1, "num_heads": 2, "block": "convolution"}
    encoder = Encoder(EncoderConfig(in_channels=5, latent_channels=4, linear_path=linear_path, **sizes))
    gaussians = GaussianConfig(per_voxel=2)
    decoder = Decoder(DecoderConfig(latent_channels=4, linear_path=linear_path, gaussians=gaussians, **sizes))
    for layer in (encoder.out_layer, decoder.out_layer):
        torch.nn.init.normal_(layer.weight, std=0.3)
    coords = torch.nn.functional.pad(torch.randint(0, 8, (40, 3)).unique(dim=0), (1, 0)).to(torch.int32)
    voxels = SparseVoxels.from_coords(coords, torch.randn(len(coords), 5), 8, 1)
    with torch.no_grad():
        before = encoder(voxels).mean
        (drawn,) = decoder(voxels.with_feats(before))
        axes = principal_axes(mixed())
        turn_latents(encoder, decoder, axes)
        after = encoder(voxels).mean
        (again,) = decoder(voxels.with_feats(after))
    torch.testing.assert_close(after, before @ axes.float(), atol=1e-5, rtol=1e-4)
    for name, value in vars(drawn).items():
        torch.testing.assert_close(getattr(again, name), value, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_turned_says_so() -> None:
    with pytest.raises(ValueError, match="N above C"):
        principal_axes(torch.randn(3, 4))
    with pytest.raises(ValueError, match="does not vary"):
        principal_axes(torch.ones(9, 2))
