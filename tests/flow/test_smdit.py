"""SMDiT against a reference written out dense and item by item, and what it promises about order and packing."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from flow_helpers import random_image, random_voxels, randomised, small_config, split_image
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.flow.config import LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.networks import FlowConfig, build_network, make_plan, predict, velocity_of
from diff2to3.flow.samplers import euler, timesteps
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT, cells
from diff2to3.flow.tokens import ImageTokens
from diff2to3.types import SparseVoxels

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = ("none", "ape", "marope")
#: What the mini preset adds to the paper's network.
EXTRAS = {"absolute": True, "pool_image": True}


# ---- an independent forward pass ----


def reference_rotary(x, ids, theta):
    """Complex rotation, pair by pair. x [L, H, D], ids [L, 3]."""
    dim = x.shape[-1]
    pairs = [dim // 2 // 3 + (axis < dim // 2 % 3) for axis in range(3)]
    angles = []
    for axis, count in enumerate(pairs):
        frequencies = theta ** (-torch.arange(count, dtype=torch.float64) / count)
        angles.append(ids[:, axis, None].double() * frequencies)
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, 1))
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
    ).flatten(-2)


def reference_embedding(ids, width):
    """Per axis sines, then cosines, of id · 10000^(−k/n); zeros fill up."""
    count = width // 3 // 2
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    parts = []
    for axis in range(3):
        angles = ids[:, axis, None].double() * frequencies
        parts += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, 1), (0, width - 6 * count))


def reference_stream(stream, x, parts, half, attended=None):
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    if half == "qkv":
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        q, k, v = (
            stream.to_qkv(h).reshape(len(x), 3, stream.num_heads, x.shape[1] // stream.num_heads).unbind(1)
        )
        root = q.shape[-1] ** 0.5
        q = q / q.norm(dim=-1, keepdim=True) * root * stream.q_rms_norm.gamma
        k = k / k.norm(dim=-1, keepdim=True) * root * stream.k_rms_norm.gamma
        return q, k, v
    x = x + gate1 * stream.to_out(attended.reshape(x.shape))
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    return x + gate2 * stream.mlp(h)


def reference_attention(q, k, v, ids, config):
    if config.position == "marope":
        q, k = (reference_rotary(x, ids, config.rope_theta) for x in (q, k))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def parts_of(modulation, network, time):
    """Six rows [D] of one item's modulation."""
    if modulation.layers is None:
        return (network.adaLN_modulation(time) + modulation.offset).chunk(6, -1)
    return modulation.layers(time).chunk(6, -1)


def reference_seen(network, y, ids_y):
    """One item's embedded image tokens."""
    c = network.config
    if c.position == "ape" or c.absolute:
        y = y + reference_embedding(ids_y, c.width)
    return y


def reference_blocks(network, x, y, ids_x, ids_y, t):
    """One item's voxel tokens x and image tokens y, as seen, through all joint blocks, the attention over their
    concatenation."""
    c = network.config
    if c.position == "ape" or c.absolute:
        x = x + reference_embedding(ids_x, c.width)
    time, ids, n = network.t_embedder(t), torch.cat([ids_x, ids_y]), len(x)
    if c.pool_image and len(y):
        hidden = [F.silu(network.image_pool.input_layer(row)) for row in y]
        time = time + network.image_pool.out_layer(sum(hidden) / len(hidden))
    for block in network.double_blocks:
        px, py = (parts_of(s.modulation, network, time) for s in (block.voxels, block.image))
        qkv = zip(
            reference_stream(block.voxels, x, px, "qkv"),
            reference_stream(block.image, y, py, "qkv"),
            strict=True,
        )
        out = reference_attention(*(torch.cat(pair) for pair in qkv), ids, c)
        x = reference_stream(block.voxels, x, px, "rest", out[:n])
        y = reference_stream(block.image, y, py, "rest", out[n:])
    both = torch.cat([x, y])
    for block in network.single_blocks:
        parts = parts_of(block.stream.modulation, network, time)
        out = reference_attention(*reference_stream(block.stream, both, parts, "qkv"), ids, c)
        both = reference_stream(block.stream, both, parts, "rest", out)
    return both[:n]


def reference_structure(network, latents, t, image):
    """Item by item over cells [C, r, r, r], with patches cut by plain indexing."""
    c, p = network.config, network.config.patch_size
    out = torch.zeros_like(latents)
    for b, item in enumerate(split_image(image)):
        cells = [(x, y, z) for x in range(c.grid) for y in range(c.grid) for z in range(c.grid)]
        cut = [tuple(slice(p * i, p * i + p) for i in cell) for cell in cells]
        tokens = torch.stack([latents[b][(slice(None), *place)].flatten() for place in cut])
        ids = torch.tensor(cells, dtype=torch.float64)
        rows = item.indices.double()
        ids_y = torch.cat([(rows + 0.5) * c.grid / item.grids - 0.5, torch.full_like(rows[:, :1], c.grid)], 1)
        x, y = network.input_layer(tokens), reference_seen(network, network.image_layer(item.feats), ids_y)
        x = reference_blocks(network, x, y, ids, ids_y, t[b : b + 1])
        x = network.out_layer(F.layer_norm(x, x.shape[-1:]))
        pieces = []
        for place, row in zip(cut, x, strict=True):
            piece = torch.zeros_like(latents[b])
            piece[(slice(None), *place)] = row.reshape(-1, p, p, p)
            pieces.append(piece)
        out[b] = torch.stack(pieces).sum(0)
    return out


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["paper", "mini"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_structure_network_against_the_reference_with_gradients(position, share, extras, generator):
    config = small_config("structure", position=position, share_modulation=share, **extras)
    network = randomised(config, generator)
    latents = torch.randn(3, 3, 4, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    image = random_image(generator, [(4, 4), (0, 0), (6, 2)])
    image = image.with_feats(image.feats.requires_grad_())
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    weights = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    inputs = [latents, image.feats, *network.parameters()]
    ours, expected = network(latents, t, image), reference_structure(network, latents, t, image)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    grads = [
        torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True) for out in (ours, expected)
    ]
    for own, reference in zip(*grads, strict=True):
        assert own is not None and reference is not None
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6)


# ---- packing, order ----


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([(0, 0), (2, 4), (4, 4), (8, 6)])),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(POSITIONS),
    st.sampled_from(["cube", "cross"]),
    st.integers(0, 100),
)
def test_packed_items_equal_each_alone(items, position, io_kernel, seed):
    """Objects and images of any sizes, in float32, to 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    extras = EXTRAS if seed % 3 else {}
    config = small_config(position=position, io_kernel=io_kernel, share_modulation=seed % 2 == 0, **extras)
    network = randomised(config, generator, dtype=torch.float32)
    latents = random_voxels(generator, [n for n, _ in items], dtype=torch.float32)
    image = random_image(generator, [size for _, size in items], dtype=torch.float32)
    t = torch.rand(len(items), generator=generator)
    together = network(latents, t, image).split([n for n, _ in items])
    for i, (voxels, tokens) in enumerate(zip(latents.unbind(), split_image(image), strict=True)):
        alone = network(voxels, t[i : i + 1], tokens)
        scale = max(1.0, float(alone.abs().max()))
        assert float((together[i] - alone).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["paper", "mini"])
@pytest.mark.parametrize("position", POSITIONS)
def test_permuting_voxels_permutes_the_output(position, extras, generator):
    network = randomised(
        small_config(position=position, patch_size=4, io_channels=[6, 8], **extras), generator
    )
    latents, image = random_voxels(generator, [90]), random_image(generator, [(4, 4)])
    t = torch.tensor([0.4], dtype=torch.float64)
    out = network(latents, t, image)
    shuffle = torch.randperm(90, generator=generator)
    moved = dataclasses.replace(latents, coords=latents.coords[shuffle], feats=latents.feats[shuffle])
    torch.testing.assert_close(network(moved, t, image), out[shuffle], rtol=0, atol=1e-10)


@pytest.mark.parametrize("position", POSITIONS)
def test_permuting_image_tokens_changes_nothing_when_their_indices_move_along(position, generator):
    network = randomised(small_config(position=position), generator)
    latents, image = random_voxels(generator, [40]), random_image(generator, [(6, 4)])
    t = torch.tensor([0.4], dtype=torch.float64)
    shuffle = torch.randperm(6, generator=generator)
    moved = ImageTokens(image.feats[shuffle], image.indices[shuffle], image.grids[shuffle], image.cu_seqlens)
    out = network(latents, t, image)
    torch.testing.assert_close(network(latents, t, moved), out, rtol=0, atol=1e-10)
    elsewhere = dataclasses.replace(image, indices=image.indices[shuffle])
    difference = float((network(latents, t, elsewhere) - out).abs().max())
    assert difference < 1e-10 if position == "none" else difference > 1e-4


@pytest.mark.parametrize("position", POSITIONS)
def test_only_shared_positions_see_where_the_object_is(position, generator):
    """Shifted by a whole number of tokens, an object without an image is the same to rotary positions and to
    none, and another to absolute ones."""
    network = randomised(small_config(position=position), generator)
    latents = random_voxels(generator, [12], resolution=4)
    here = dataclasses.replace(latents, resolution=8)
    coords = latents.coords + torch.tensor([0, 2, 4, 2], dtype=torch.int32)
    there = dataclasses.replace(here, coords=coords)
    t, nothing = torch.tensor([0.6], dtype=torch.float64), ImageTokens.none(1, 20).to(dtype=torch.float64)
    difference = float((network(here, t, nothing) - network(there, t, nothing)).abs().max())
    assert difference > 1e-4 if position == "ape" else difference < 1e-5


def test_absolute_voxels_know_their_place_in_the_volume_and_in_their_token(generator):
    """What is added to a voxel differs for all 4³ places in a token and is the same one token further."""
    network = randomised(small_config(patch_size=4, io_channels=[6, 8], absolute=True), generator)
    places = torch.cartesian_prod(*[torch.arange(4)] * 3)
    coords = torch.nn.functional.pad(places, (1, 0)).int()
    here, there = cells(coords, 4), cells(coords + torch.tensor([0, 4, 0, 4], dtype=torch.int32), 4)
    assert here.tolist() == list(range(64)) and torch.equal(here, there)
    assert network.cell_embedding.weight.shape == (64, 6)
    feats = torch.ones(64, 3, dtype=torch.float64)
    t, nothing = torch.tensor([0.6], dtype=torch.float64), ImageTokens.none(1, 20).to(dtype=torch.float64)
    near = SparseVoxels.from_coords(coords, feats, 8)
    far = SparseVoxels.from_coords(coords + torch.tensor([0, 4, 4, 4], dtype=torch.int32), feats, 8)
    assert float((network(near, t, nothing) - network(far, t, nothing)).abs().max()) > 1e-4


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_condition_and_time_matter_and_plans_are_reusable(stage, generator):
    network = randomised(small_config(stage), generator, dtype=torch.float32)
    image = random_image(generator, [(4, 4), (4, 4)], dtype=torch.float32)
    latents = torch.randn(2, 3, 4, 4, 4, generator=generator)
    if stage == "latents":
        latents = random_voxels(generator, [30, 50], dtype=torch.float32)
    t = torch.tensor([0.3, 0.3])
    plan = make_plan(network, latents, image)
    out = predict(network, latents, t, image, plan)
    assert torch.equal(out, predict(network, latents, t, image))
    assert not torch.allclose(out, predict(network, latents, t + 0.4, image, plan), atol=1e-3)
    other = image.with_feats(image.feats + 1)
    assert not torch.allclose(out, predict(network, latents, t, other, plan), atol=1e-3)
    nothing = ImageTokens.none(2, 20)
    assert not torch.allclose(out, predict(network, latents, t, nothing), atol=1e-3)


# ---- sizes ----


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(config).parameters())


def test_large_has_the_published_size():
    """651 M, and 821 M with the VAE's 171 M less rounding (the paper's table 2), to 1 %."""
    from diff2to3.vae.config import DecoderConfig, EncoderConfig
    from diff2to3.vae.decoder import Decoder
    from diff2to3.vae.encoder import Encoder

    flow = count(FlowConfig())
    assert flow == pytest.approx(651e6, rel=0.01)
    with torch.device("meta"):
        networks = [Encoder(EncoderConfig()), Decoder(DecoderConfig())]
    vae = sum(p.numel() for network in networks for p in network.parameters())
    assert flow + vae == pytest.approx(821e6, rel=0.01)


def test_large_patchifies_as_figure_3_says():
    with torch.device("meta"):
        network = LatentSMDiT(LatentSMDiTConfig())
    assert network.input_layer.weight.shape == (128, 8)
    assert network.input_blocks[-1].conv1.conv.weight.shape == (1024, 3, 3, 3, 128)
    assert network.image_layer.weight.shape == (1024, 64)
    assert (len(network.double_blocks), len(network.single_blocks)) == (8, 16)
    assert network.out_blocks[0].conv1.conv.weight.shape == (128, 3, 3, 3, 2048)


def test_training_starts_at_zero_velocity(generator):
    for stage in ("structure", "latents"):
        network = build_network(small_config(stage))
        latents = torch.randn(1, 3, 4, 4, 4, generator=generator)
        if stage == "latents":
            latents = random_voxels(generator, [30], dtype=torch.float32)
        image = random_image(generator, [(4, 4)], dtype=torch.float32)
        assert float(predict(network, latents, torch.tensor([0.5]), image).abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "rope"}, "position"),
        ({"backbone": "unet"}, "backbone"),
        ({"backbone": "dit"}, "'ape'"),
        ({"backbone": "dit", "position": "ape", "pool_image": True}, "pool_image: smdit only"),
        ({"num_heads": 5}, "num_heads"),
        ({"io_channels": [8, 8]}, "io_channels"),
        ({"io_kernel": "star"}, "io_kernel"),
        ({"stage": "structure", "resolution": 5}, "patch_size"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small_config(**change)
    with pytest.raises(ValueError, match="resolution"):
        SMDiTConfig(resolution=0)


def test_bad_inputs_are_named(generator):
    network = StructureSMDiT(small_config("structure").network_config())
    image = random_image(generator, [(4, 4)], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"latents: expected \[B, 3, 4, 4, 4\]"):
        network(torch.zeros(1, 3, 4, 4, 2), torch.tensor([0.5]), image)
    with pytest.raises(ValueError, match="image: expected 2 items"):
        network(torch.zeros(2, 3, 4, 4, 4), torch.tensor([0.5, 0.5]), image)


# ---- the baseline behind the same call ----


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_the_baseline_takes_the_same_inputs(stage, generator):
    network = randomised(small_config(stage, backbone="dit", position="ape"), generator)
    image = random_image(generator, [(4, 4), (0, 0)])
    latents = torch.randn(2, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    if stage == "latents":
        latents = random_voxels(generator, [30, 20])
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    out = predict(network, latents, t, image)
    first, second = latents.unbind() if stage == "latents" else (latents[:1], latents[1:])
    alone = predict(network, second, t[1:], ImageTokens.none(1, 20).to(dtype=torch.float64))
    torch.testing.assert_close(out[-len(alone) :], alone, rtol=0, atol=1e-9)
    present = split_image(image)[0]
    moved = dataclasses.replace(present, indices=present.indices.flip(0))
    one = predict(network, first, t[:1], present)
    torch.testing.assert_close(out[: len(one)], one, rtol=0, atol=1e-9)
    assert not torch.allclose(
        predict(network, first, t[:1], moved), one, atol=1e-4
    )  # it knows where patches are
    with pytest.raises(ValueError, match="one length"):
        predict(network, latents, t, random_image(generator, [(4, 4), (4, 6)]))


def test_velocity_of_is_what_samplers_take(generator):
    network = randomised(small_config(), generator, std=0.05, dtype=torch.float32)
    noise, image = (
        random_voxels(generator, [40], dtype=torch.float32),
        random_image(generator, [(4, 4)], dtype=torch.float32),
    )
    out = euler(velocity_of(network, noise, image), noise.feats, timesteps(3))
    z = noise.feats
    for t, t_next in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        with torch.no_grad():
            z = z - (t - t_next) * network(noise.with_feats(z), torch.tensor([t], dtype=torch.float64), image)
    torch.testing.assert_close(out, z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", ["structure", "latents"])
def test_autocast_computes_the_same_with_and_without_gradients(stage, generator):
    """Training runs under autocast with gradients, validation without: attention takes another path there."""
    network = randomised(small_config(stage), generator, std=0.3, dtype=torch.float32)
    image = random_image(generator, [(4, 4), (0, 0), (6, 4)], dtype=torch.float32)
    latents = torch.randn(3, 3, 4, 4, 4, generator=generator)
    if stage == "latents":
        latents = random_voxels(generator, [30, 7, 50], dtype=torch.float32)
    t = torch.tensor([0.3, 0.6, 0.9])
    exact = predict(network, latents, t, image)
    with torch.autocast("cpu", torch.bfloat16):
        trained = predict(network, latents, t, image).float()
        with torch.no_grad():
            validated = predict(network, latents, t, image).float()
    other = predict(
        network, latents, t, random_image(generator, [(4, 4), (0, 0), (6, 4)], dtype=torch.float32)
    )
    seen = float((other - exact).detach().norm())  # a path that lost the image would be about this far off
    assert float((trained - validated).detach().norm()) < 0.25 * seen
    assert float((validated - exact).detach().norm()) < 0.5 * seen
