"""The baseline's velocity networks: independence of batching and order, patches, time, condition,
gradients.
"""

import dataclasses

import pytest
import torch

from diff2to3.flow.config import DiTConfig, LatentDiTConfig
from diff2to3.flow.dit import LatentDiT, StructureDiT, to_grid, to_tokens
from diff2to3.nn.attention import AttentionHooks
from diff2to3.nn.embeddings import TimestepEmbedder, absolute_position_embedding
from diff2to3.types import SparseVoxels

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "width": 32,
    "cond_channels": 6,
    "num_blocks": 2,
    "num_heads": 2,
}


def randomise(module, generator, std=0.2):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def random_latents(generator, counts, resolution=8, channels=3, dtype=torch.float64):
    items = []
    for count in counts:
        cells = torch.randperm(resolution**3, generator=generator)[:count].sort().values
        xyz = torch.stack([cells // resolution**2, cells // resolution % resolution, cells % resolution], 1)
        feats = torch.randn(count, channels, generator=generator, dtype=dtype)
        items.append(SparseVoxels.from_coords(torch.nn.functional.pad(xyz, (1, 0)), feats, resolution))
    return SparseVoxels.cat(items)


LATENT_CASES = [
    {"io_channels": [16], "patch_size": 2},
    {"io_channels": [8, 16], "patch_size": 4, "num_io_blocks": 1},
    {"io_channels": [8, 16], "patch_size": 4, "num_io_blocks": 3, "skip_connection": False},
    {"io_channels": [], "patch_size": 1, "share_modulation": True, "qk_rms_norm_cross": True},
    {"io_channels": [16], "patch_size": 2, "share_modulation": True, "qk_rms_norm": False, "reduce": "mean"},
]


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_latent_items_do_not_see_each_other_and_order_does_not_matter(case, generator):
    network = randomise(LatentDiT(LatentDiTConfig(**SMALL, resolution=8, **case)), generator).double()
    latents = random_latents(generator, [70, 1, 40])
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    cond = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    together = network(latents, t, cond)
    assert together.shape == (111, 3)
    for i, (item, expected) in enumerate(zip(latents.unbind(), together.split([70, 1, 40]), strict=True)):
        torch.testing.assert_close(network(item, t[i : i + 1], cond[i : i + 1]), expected, rtol=0, atol=1e-9)
    first, shuffle = latents.unbind()[0], torch.randperm(70, generator=generator)
    moved = dataclasses.replace(first, coords=first.coords[shuffle], feats=first.feats[shuffle])
    torch.testing.assert_close(network(moved, t[:1], cond[:1]), together[:70][shuffle], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_a_reused_plan_changes_nothing(case, generator):
    network = randomise(LatentDiT(LatentDiTConfig(**SMALL, resolution=8, **case)), generator)
    latents = random_latents(generator, [50, 20], dtype=torch.float32)
    t, cond = torch.tensor([0.3, 0.3]), torch.randn(2, 4, 6, generator=generator)
    plan = network.plan(latents, 4)
    assert torch.equal(network(latents, t, cond, plan), network(latents, t, cond))
    short = plan.with_context(1)
    assert torch.equal(network(latents, t, cond[:, :1], short), network(latents, t, cond[:, :1]))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_structure_items_do_not_see_each_other(patch_size, generator):
    config = DiTConfig(**SMALL, resolution=4, patch_size=patch_size)
    network = randomise(StructureDiT(config), generator).double()
    latents = torch.randn(3, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    cond = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    together = network(latents, t, cond)
    assert together.shape == latents.shape
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(network(latents[one], t[one], cond[one]), together[one], rtol=0, atol=1e-9)


def test_patches_hold_their_cells_channel_slowest():
    grid = torch.arange(2 * 3 * 4 * 4 * 4).reshape(2, 3, 4, 4, 4)
    tokens = to_tokens(grid, 2)
    assert tokens.shape == (2, 8, 24)
    # token (x, y, z) = (1, 0, 1); channel 2, cell (0, 1, 1)
    assert tokens[1, 5, 2 * 8 + 3] == grid[1, 2, 2, 1, 3]
    assert torch.equal(to_grid(tokens, 2, 2), grid)


def test_zeros_as_condition_can_be_one_token(generator):
    """Attention over equal keys returns their value, so any number of zero tokens is one: what guidance
    relies on.
    """
    network = randomise(
        StructureDiT(DiTConfig(**SMALL, resolution=4, qk_rms_norm_cross=True)), generator
    ).double()
    latents = torch.randn(1, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.4], dtype=torch.float64)
    many, one = (network(latents, t, torch.zeros(1, length, 6, dtype=torch.float64)) for length in (9, 1))
    torch.testing.assert_close(many, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["latent", "structure"])
def test_gradients_reach_every_parameter_also_with_checkpointing(kind, generator):
    if kind == "latent":
        network = randomise(LatentDiT(LatentDiTConfig(**SMALL, resolution=8, io_channels=[16])), generator)
        latents = random_latents(generator, [60, 30], dtype=torch.float32)
    else:
        network = randomise(StructureDiT(DiTConfig(**SMALL, resolution=4)), generator)
        latents = torch.randn(2, 3, 4, 4, 4, generator=generator)
    t, cond = torch.tensor([0.2, 0.7]), torch.randn(2, 4, 6, generator=generator)
    network(latents, t, cond).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in network.named_parameters()}
    for name, grad in grads.items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name
    network.zero_grad()
    network.checkpoint_blocks = True
    network(latents, t, cond).square().sum().backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5 * float(grads[name].abs().max()))


def test_an_untrained_network_predicts_zero(generator):
    network = LatentDiT(LatentDiTConfig(**SMALL, resolution=8, io_channels=[16]))
    latents = random_latents(generator, [20], dtype=torch.float32)
    out = network(latents, torch.tensor([0.5]), torch.randn(1, 4, 6, generator=generator))
    assert torch.count_nonzero(out) == 0


def test_hooks_see_the_chosen_blocks_cross_attention(generator):
    network = randomise(LatentDiT(LatentDiTConfig(**SMALL, resolution=8, io_channels=[])), generator)
    latents = random_latents(generator, [30, 12], dtype=torch.float32)
    t, cond = torch.tensor([0.2, 0.7]), torch.randn(2, 4, 6, generator=generator)
    plain = network(latents, t, cond)
    seen = {}
    watching = {1: AttentionHooks(heads=(0, 1), on_probs=seen.__setitem__)}
    torch.testing.assert_close(network(latents, t, cond, cross_hooks=watching), plain, rtol=1e-4, atol=1e-5)
    assert {i: tuple(p.shape) for i, p in seen.items()} == {0: (2, 30, 4), 1: (2, 12, 4)}
    # a bias that hides all tokens but the first equals a condition of the first token alone
    hide = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    hidden = {i: AttentionHooks(logit_bias=lambda _: hide) for i in range(2)}
    torch.testing.assert_close(
        network(latents, t, cond, cross_hooks=hidden), network(latents, t, cond[:, :1]), rtol=1e-4, atol=1e-5
    )


def test_time_is_scaled_once_in_double_precision(generator):
    embedder = randomise(TimestepEmbedder(8), generator)
    t = 0.123456789
    exact = embedder(torch.tensor([t], dtype=torch.float64))
    angle = torch.tensor([1000 * t], dtype=torch.float32)
    frequencies = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = angle.double()[:, None] * frequencies
    expected = embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).float())
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-4)


def test_position_embedding_by_hand():
    coords = torch.tensor([[3, 0, 5]], dtype=torch.int32)
    out = absolute_position_embedding(coords, 14)  # 3 axes × 2 frequencies × (sin, cos) = 12, and two zeros
    expected = []
    for x in (3, 0, 5):
        angles = torch.tensor([x * 1.0, x * 0.01])
        expected += [*angles.sin().tolist(), *angles.cos().tolist()]
    torch.testing.assert_close(out[0], torch.tensor([*expected, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (LatentDiTConfig(), 600.7),
        (DiTConfig(), 555.5),
    ],
)
def test_published_size(config, millions):
    """TRELLIS-image-large: 1.2 B parameters in the two flow models together, its latent flow model about
    600 M.
    """
    with torch.device("meta"):
        network = LatentDiT(config) if isinstance(config, LatentDiTConfig) else StructureDiT(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_half_precision_torso_stays_close(generator):
    network = randomise(LatentDiT(LatentDiTConfig(**SMALL, resolution=8, io_channels=[16])), generator, 0.1)
    latents = random_latents(generator, [60], dtype=torch.float32)
    t, cond = torch.tensor([0.2]), torch.randn(1, 4, 6, generator=generator)
    exact = network(latents, t, cond)
    network.cast_torso(torch.bfloat16)
    rounded = network(latents, t, cond)
    assert rounded.dtype == torch.float32 and network.t_embedder.mlp[0].weight.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_bad_input(generator):
    with pytest.raises(ValueError, match="patch_size: 3 does not divide"):
        DiTConfig(resolution=16, patch_size=3)
    with pytest.raises(ValueError, match="io_channels: patch_size 4 needs"):
        LatentDiTConfig(patch_size=4, io_channels=[8])
    with pytest.raises(ValueError, match="num_heads: 3 does not divide"):
        DiTConfig(width=16, num_heads=3)
    network = StructureDiT(DiTConfig(**SMALL, resolution=4))
    latents, t = torch.zeros(1, 3, 4, 4, 4), torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"cond: expected \[1, L, 6\]"):
        network(latents, t, torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match=r"latents: expected \[B, 3, 4, 4, 4\]"):
        network(latents[:, :, 1:], t, torch.zeros(1, 4, 6))
