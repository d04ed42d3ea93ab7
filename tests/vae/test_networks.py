"""The autoencoders: sizes, independence of batching and order, gradients, and the formulas of the Gaussian
head.
"""

import dataclasses
import math

import pytest
import torch

from diff2to3.types import SparseVoxels
from diff2to3.vae.config import DecoderConfig, EncoderConfig, GaussianConfig, StructureConfig
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.gaussian_head import offset_perturbation, split_raw, to_gaussians
from diff2to3.vae.posterior import Posterior
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder, active_voxels

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"resolution": 8, "width": 24, "num_blocks": 3, "num_heads": 2, "window": 4}


def random_voxels(generator, counts, channels, resolution=8, dtype=torch.float32):
    items = []
    for count in counts:
        cells = torch.randperm(resolution**3, generator=generator)[:count].sort().values
        xyz = torch.stack([cells // resolution**2, cells // resolution % resolution, cells % resolution], 1)
        coords = torch.nn.functional.pad(xyz, (1, 0))
        feats = torch.randn(count, channels, generator=generator, dtype=dtype)
        items.append(SparseVoxels.from_coords(coords, feats, resolution))
    return SparseVoxels.cat(items)


def randomise(module, generator, std=0.2):
    """Overwrite every parameter, so that nothing hides behind an initial zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


BLOCKS = [
    {"block": "attention"},
    {"block": "attention", "attention": "full", "qk_rms_norm": True},
    {"block": "convolution"},
    {"block": "alternating", "conv_kernel": "cross"},
]


@pytest.mark.parametrize("choice", BLOCKS, ids=lambda c: "-".join(map(str, c.values())))
def test_items_do_not_see_each_other_and_order_does_not_matter(choice, generator):
    config = EncoderConfig(**SMALL, **choice, in_channels=5, latent_channels=3, linear_path=True)
    network = randomise(Encoder(config), generator).double()
    voxels = random_voxels(generator, [60, 1, 90], 5, dtype=torch.float64)
    together = network(voxels)
    for item, mean, logvar in zip(
        voxels.unbind(), together.mean.split([60, 1, 90]), together.logvar.split([60, 1, 90]), strict=True
    ):
        alone = network(item)
        torch.testing.assert_close(alone.mean, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.logvar, logvar, rtol=0, atol=1e-10)
    first = voxels.unbind()[0]
    shuffle = torch.randperm(60, generator=generator)
    moved = dataclasses.replace(first, coords=first.coords[shuffle], feats=first.feats[shuffle])
    torch.testing.assert_close(network(moved).mean, together.mean[:60][shuffle], rtol=0, atol=1e-10)


def test_a_voxel_sees_its_window_only_in_the_first_block(generator):
    """Half a window further, the second block lets it through: windows are shifted by half."""
    one, two = (EncoderConfig(**{**SMALL, "num_blocks": n}, in_channels=2) for n in (1, 2))
    # voxel a in [0, 4)³, b in the next window along x, both in the window of the shifted grid
    coords = torch.tensor([[0, 3, 1, 1], [0, 4, 1, 1]], dtype=torch.int32)
    feats = torch.randn(2, 2, generator=generator)
    changed = feats + torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    for config, reaches in ((one, False), (two, True)):
        network = randomise(Encoder(config), generator)
        before = network(SparseVoxels.from_coords(coords, feats, 8)).mean[0]
        after = network(SparseVoxels.from_coords(coords, changed, 8)).mean[0]
        assert torch.equal(before, after) != reaches


@pytest.mark.parametrize("choice", BLOCKS, ids=lambda c: "-".join(map(str, c.values())))
def test_gradients_reach_every_parameter(choice, generator):
    config = DecoderConfig(
        **SMALL, **choice, latent_channels=3, linear_path=True, gaussians=GaussianConfig(per_voxel=2)
    )
    network = randomise(Decoder(config), generator)
    latents = random_voxels(generator, [40, 30], 3)

    def loss():
        items = network(latents)
        return sum(
            (g.means * 3 + g.scales + g.quats[:, 1:] + g.sh[:, 0]).square().sum() for g in items
        ) + sum(g.opacities.sum() for g in items)

    loss().backward()
    grads = {name: p.grad.clone() for name, p in network.named_parameters()}
    for name, grad in grads.items():
        # softmax does not see a bias of the keys, a third of to_qkv's bias
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name

    network.zero_grad()
    network.checkpoint_blocks = True
    loss().backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-6)


def test_gaussian_head_follows_its_formulas(generator):
    config = GaussianConfig(per_voxel=3, quats_gain=0.1, scales_gain=0.5)
    voxels = random_voxels(generator, [4, 2], 1)
    raw = torch.randn(6, 42, generator=generator, dtype=torch.float64)
    perturbation = offset_perturbation(config).double()
    items = to_gaussians(split_raw(raw, config), voxels, perturbation, config)
    assert [len(g) for g in items] == [12, 6]
    softplus_inverse = math.log(math.expm1(4e-3))
    points = [(0.0, 0.0, 0.0), (1 / 3, 0.5, 1 / 3), (2 / 3, 0.25, 2 / 3)]  # Hammersley, n = 3, bases 2 and 3
    for n in range(6):
        item, row = (0, n) if n < 4 else (1, n - 4)
        for k in range(3):
            g, i = items[item], 3 * row + k
            for axis in range(3):
                start = math.atanh((2 * points[k][axis] - 1) / 1.5)
                center = (int(voxels.coords[n, 1 + axis]) + 0.5) / 8 - 0.5
                offset = math.tanh(float(raw[n, 3 * k + axis]) + start) * 0.75 / 8
                assert float(g.means[i, axis]) == pytest.approx(center + offset, abs=1e-6)
                assert float(g.sh[i, 0, axis]) == pytest.approx(float(raw[n, 9 + 3 * k + axis]), abs=1e-12)
                before = math.log1p(math.exp(0.5 * float(raw[n, 18 + 3 * k + axis]) + softplus_inverse))
                assert float(g.scales[i, axis]) == pytest.approx(math.hypot(before, 9e-4), rel=1e-6)
            q = [0.1 * float(x) for x in raw[n, 27 + 4 * k : 31 + 4 * k]]
            q[0] += 1
            assert g.quats[i].tolist() == pytest.approx([x / math.hypot(*q) for x in q], abs=1e-7)
            logit = float(raw[n, 39 + k]) + math.log(0.1 / 0.9)
            assert float(g.opacities[i]) == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-7)


def test_decoder_starts_at_the_documented_gaussians(generator):
    """An untrained decoder outputs zeros: opacity 0.1, scale √(0.004² + 0.0009²), means spread over the
    box.
    """
    network = Decoder(DecoderConfig(**SMALL, gaussians=GaussianConfig(per_voxel=4)))
    (g,) = network(random_voxels(generator, [5], 8))
    assert torch.allclose(g.opacities, torch.tensor(0.1)) and torch.all(g.sh == 0)
    assert torch.allclose(g.scales, torch.tensor(math.hypot(4e-3, 9e-4)), rtol=1e-4)
    assert torch.allclose(g.quats, torch.tensor([1.0, 0, 0, 0]))


def test_exponential_scales(generator):
    config = GaussianConfig(per_voxel=1, scale_activation="exp", spread_offsets=False, min_scale=0.0)
    voxels = random_voxels(generator, [2], 1)
    raw = torch.full((2, 14), 0.3)
    (g,) = to_gaussians(split_raw(raw, config), voxels, torch.zeros(1, 3), config)
    assert torch.allclose(g.scales, torch.tensor(4e-3 * math.exp(0.3)))


def test_empty_items(generator):
    """A batch item without voxels gives no Gaussians; a batch without any still runs."""
    network = Decoder(DecoderConfig(**SMALL, gaussians=GaussianConfig(per_voxel=2)))
    coords = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)
    voxels = SparseVoxels.from_coords(coords, torch.zeros(1, 8), 8, batch_size=3)
    assert [len(g) for g in network(voxels)] == [0, 2, 0]
    nothing = SparseVoxels.from_coords(coords[:0], torch.zeros(0, 8), 8, batch_size=2)
    assert [len(g) for g in network(nothing)] == [0, 0]


def test_half_precision_torso_stays_close(generator):
    network = randomise(Encoder(EncoderConfig(**SMALL, in_channels=4)), generator)
    voxels = random_voxels(generator, [50], 4)
    exact = network(voxels).mean
    network.cast_torso(torch.bfloat16)
    assert network.torso_dtype == torch.bfloat16
    assert network.input_layer.weight.dtype == network.out_layer.weight.dtype == torch.float32
    rounded = network(voxels).mean
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_published_size():
    """TRELLIS counts 171 M parameters in encoder and decoder; ours has 16 input channels in place of 1024."""
    with torch.device("meta"):
        networks = Encoder(EncoderConfig(in_channels=1024)), Decoder(DecoderConfig())
    count = sum(p.numel() for network in networks for p in network.parameters())
    assert abs(count - 171e6) < 0.01 * 171e6


def test_posterior_samples_with_its_generator_and_measures_kl():
    mean, logvar = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.0, -2.0]])
    posterior = Posterior(mean, logvar)
    draws = [posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(draws[0], mean + torch.exp(logvar / 2) * noise)
    normal = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert torch.allclose(posterior.kl(), expected)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_structure_vae_halves_and_doubles_the_grid(norm, generator):
    config = StructureConfig(channels=[32, 32, 64], num_res_blocks=1, num_middle_blocks=1, norm=norm)
    encoder = randomise(StructureEncoder(config), generator, 0.05)
    decoder = randomise(
        StructureDecoder(dataclasses.replace(config, channels=config.channels[::-1])), generator, 0.05
    )
    occupancy = (torch.rand(2, 1, 16, 16, 16, generator=generator) > 0.5).float()
    posterior = encoder(occupancy)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 8, 4, 4, 4)
    logits = decoder(posterior.mean)
    assert logits.shape == (2, 1, 16, 16, 16)
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters())
    alone = decoder(encoder(occupancy[1:]).mean)
    torch.testing.assert_close(alone, logits[1:], rtol=1e-4, atol=1e-5)


def test_active_voxels_are_sorted_cells_above_the_threshold():
    logits = torch.full((2, 1, 3, 3, 3), -1.0)
    for cell in [(1, 0, 2, 0, 1), (0, 0, 1, 1, 2), (0, 0, 0, 2, 2)]:
        logits[cell] = 0.5
    logits[1, 0, 0, 0, 0] = 0.0  # not above 0
    assert active_voxels(logits).tolist() == [[0, 0, 2, 2], [0, 1, 1, 2], [1, 2, 0, 1]]
    with pytest.raises(ValueError, match=r"logits: expected \[B, 1, R, R, R\]"):
        active_voxels(logits[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(block="linear"), "block: expected one of"),
        (lambda: EncoderConfig(attention="swan"), "attention: expected one of"),
        (lambda: EncoderConfig(width=10, num_heads=3), "num_heads: 3 does not divide width 10"),
        (lambda: DecoderConfig(window=0), "window: expected a positive"),
        (lambda: GaussianConfig(reach=0.5), "reach: spread_offsets needs"),
        (lambda: GaussianConfig(scale_activation="relu"), "scale_activation"),
        (lambda: GaussianConfig(opacity_bias=1.0), "opacity_bias"),
        (lambda: StructureConfig(norm="batch"), "norm: expected"),
        (lambda: StructureConfig(channels=[]), "channels: expected"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()
