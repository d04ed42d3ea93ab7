"""The 2to3-VAE's training objective, its start and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diff2to3.config import load_config
from diff2to3.errors import InputError
from diff2to3.gaussians.render import render
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.vae import VaeRunConfig
from diff2to3.training.tasks.vae_objective import VaeLossConfig, VaeObjective
from diff2to3.types import SparseVoxels, Views
from diff2to3.vae.config import DecoderConfig, EncoderConfig, GaussianConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.start import start_linear_paths, start_logvar

CONFIGS = Path(__file__).parents[3] / "configs" / "vae"
TORSO = dict(resolution=8, width=16, num_blocks=1, num_heads=2, block="convolution", conv_kernel="cross")


@dataclass
class TinyBatch:
    step: int
    ids: tuple[str, ...]
    voxels: SparseVoxels
    views: dict[str, Views]


def networks(seed: int = 0) -> tuple[Encoder, Decoder]:
    torch.manual_seed(seed)
    encoder = Encoder(EncoderConfig(in_channels=6, linear_path=True, **TORSO))  # type: ignore[arg-type]
    gaussians = GaussianConfig(per_voxel=4, scale_bias=2e-2, opacity_bias=0.9)
    decoder = Decoder(DecoderConfig(linear_path=True, gaussians=gaussians, **TORSO))  # type: ignore[arg-type]
    return encoder, decoder


def tiny_batch(num: int = 2, size: int = 32) -> TinyBatch:
    """Plates of voxels with colours, seen from above."""
    generator = torch.Generator().manual_seed(1)
    items, images = [], []
    K = torch.tensor([[[size * 1.0, 0, size / 2], [0, size * 1.0, size / 2], [0, 0, 1]]])
    viewmat = torch.eye(4)[None].clone()
    viewmat[0, :3, :3] = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
    viewmat[0, 2, 3] = 1.5
    for b in range(num):
        x, y = torch.meshgrid(torch.arange(1, 7 - b), torch.arange(1, 7), indexing="ij")
        coords = torch.stack([torch.zeros_like(x), x, y, torch.full_like(x, 4)], -1).reshape(-1, 4).int()
        feats = 0.3 * torch.randn(len(coords), 6, generator=generator)
        items.append(SparseVoxels.from_coords(coords, feats, 8, 1))
        images.append(torch.rand(2, size, size, 3, generator=generator))
    views = Views(
        torch.cat(images),
        torch.ones(2 * num, size, size),
        viewmat.expand(2 * num, 4, 4),
        K.expand(2 * num, 3, 3),
    )
    return TinyBatch(0, tuple(f"asset-{b}" for b in range(num)), SparseVoxels.cat(items), {"target": views})


def test_losses_do_not_depend_on_how_assets_are_dealt() -> None:
    objective = VaeObjective(*networks(), VaeLossConfig(lpips=0.0, l2=1.0, edges=0.1))
    batch, randomness = tiny_batch(), Randomness(3, 0)
    together = objective(batch, randomness)
    for b, voxels in enumerate(batch.voxels.unbind()):
        part = TinyBatch(
            0, batch.ids[b : b + 1], voxels, {"target": batch.views["target"].select([2 * b, 2 * b + 1])}
        )
        alone = objective(part, randomness)
        assert set(alone) == set(together)
        for name, value in alone.items():
            assert torch.allclose(value[0], together[name][b], atol=1e-5), name


def test_every_weight_learns_and_a_few_steps_lower_the_loss() -> None:
    encoder, decoder = networks()
    objective = VaeObjective(encoder, decoder, VaeLossConfig(lpips=0.0), sizes=((0, 16), (5, 32)))
    start_logvar(encoder, -5.0)
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-2)
    batch, values = tiny_batch(), []
    for step in range(15):
        optimiser.zero_grad()
        loss = objective(batch, Randomness(0, 0))["loss"].mean()
        loss.backward()
        optimiser.step()
        values.append(float(loss.detach()))
        if step == 4:  # layers that begin at zero pass a gradient on once they have moved
            for name, parameter in objective.named_parameters():
                assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    assert values[-1] < 0.8 * values[0]


def test_gaussians_that_are_no_numbers_give_that_asset_a_loss_that_is_none() -> None:
    """Not an error of the rasteriser: the training loop stops at the loss, names the asset and saves the batch."""
    objective = VaeObjective(*networks(), VaeLossConfig(lpips=0.0, edges=0.1))
    batch = tiny_batch()
    good = objective(batch, Randomness(3, 0))
    batch.voxels.feats[-1] = torch.inf
    found = objective(batch, Randomness(3, 0))
    assert set(found) == set(good)
    for name, value in found.items():
        assert torch.allclose(value[0], good[name][0]) and not bool(value[1].isfinite()), name
    found["loss"].sum().backward()
    assert all(
        p.grad is not None for p in objective.parameters()
    )  # as many as in any step, for other processes


def test_size_schedule() -> None:
    objective = VaeObjective(*networks(), VaeLossConfig(lpips=0.0), sizes=((2, 16), (5, 32)))
    assert [objective.size_at(s) for s in (0, 2, 4, 5, 99)] == [None, 16, 16, 32, 32]


def test_start_shows_colours_and_points_at_once() -> None:
    encoder, decoder = networks()
    start_logvar(encoder, -7.0)
    start_linear_paths(encoder, decoder, color=0, point=3, factor=4.0)
    coords = torch.tensor([[0, 4, 4, 4]], dtype=torch.int32)
    color, point = torch.tensor([0.9, 0.4, 0.1]), torch.tensor([0.2, -0.1, 0.3])
    feats = torch.cat([(color - 0.5) * 4, point * 4])[None]
    posterior = encoder(SparseVoxels.from_coords(coords, feats, 8))
    assert torch.allclose(posterior.mean[0, :6], feats[0], atol=1e-6)
    assert float(posterior.logvar.detach().max()) == pytest.approx(-7)
    (g,) = decoder(SparseVoxels.from_coords(coords, posterior.mean, 8))
    zero = torch.zeros_like(posterior.mean)
    (unmoved,) = decoder(SparseVoxels.from_coords(coords, zero, 8))
    moved = (g.means - unmoved.means).mean(0) * 8  # in voxels; the box squeezes what is near its faces
    assert torch.allclose(moved, point, atol=0.12) and float((moved / point).min()) > 0.6
    K = torch.tensor([[[64.0, 0, 32], [0, 64.0, 32], [0, 0, 1]]])
    viewmat = torch.eye(4)[None].clone()
    viewmat[0, :3, 3] = -g.means.mean(0) + torch.tensor([0, 0, 0.6])
    drawn = render(g, viewmat, K, 64, 64, background=0.0)
    assert torch.allclose(drawn.colors[0, 32, 32] / drawn.alphas[0, 32, 32], color, atol=0.02)


def test_start_needs_its_networks() -> None:
    encoder, decoder = networks()
    with pytest.raises(ValueError, match="linear_path"):
        start_linear_paths(Encoder(EncoderConfig(in_channels=6, **TORSO)), decoder, 0, 3, 4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logvar"):
        start_logvar(encoder, float("nan"))


@pytest.mark.parametrize("name, millions", [("large", 171.0), ("large_dinov2", 171.0)])
def test_large_presets_have_the_published_size(name: str, millions: float) -> None:
    config = load_config(VaeRunConfig, CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        modules = Encoder(config.encoder), Decoder(config.decoder)
    count = sum(p.numel() for m in modules for p in m.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_builds(path: Path) -> None:
    config = load_config(VaeRunConfig, path)
    with torch.device("meta"):
        encoder, decoder = Encoder(config.encoder), Decoder(config.decoder)
    assert encoder.config.latent_channels == decoder.config.latent_channels == 8


@pytest.mark.parametrize(
    "override, message",
    [
        ("decoder.resolution=16", "decoder.resolution"),
        ("data.view_set=other", "data.loader.views"),
        ("sizes=[[5,128],[0,256]]", "rising steps"),
        ("data.loader.features=[mini]", "surface"),
        ("loss.kl=-1.0", "kl"),
    ],
)
def test_bad_configurations_are_named(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(VaeRunConfig, CONFIGS / "mini.yaml", [override])
