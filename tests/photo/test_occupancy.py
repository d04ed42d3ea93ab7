"""The occupancy flow: its velocity against closed forms, its input against loops."""

import math
from itertools import pairwise

import pytest
import torch

from diff2to3.photo.encoder import PhotoEncoder, PhotoEncoderConfig, PhotoMaps, camera_loss, depth_loss
from diff2to3.photo.frustum import DEPTH_REACH, fold, project_points, voxel_centers
from diff2to3.photo.occupancy import OccupancyFlow, OccupancyFlowConfig, velocity

ENCODER = PhotoEncoderConfig(widths=(8, 8, 16), plane_channels=4, frustum_channels=2, depth_bins=6)
FLOW = OccupancyFlowConfig(
    resolution=16, fine_width=8, coarse_width=16, num_coarse=1, time_width=16, plane_channels=4, frustum_channels=2,
    token_channels=16,
)  # fmt: skip


def randomly(module):
    """Initial weights are zeros in places, which would hide what they multiply."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return module.eval()


def some_maps(batch, seed=0):
    g = torch.Generator().manual_seed(seed)
    return PhotoMaps(
        torch.randn(batch, 40, 32, 32, generator=g),
        torch.randn(batch, 112, 16, 16, generator=g),
        torch.rand(batch, 4, 64, 64, generator=g),
    )


def test_steps_along_the_exact_velocity_end_at_the_data():
    """One voxel, ±1 with probabilities p and 1 - p, of which P(z_0 = 1 | z_t) is known: samples must have them."""
    p, steps, count = 0.3, 400, 4000
    z = torch.randn(count, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for now, then in pairwise(times):
        logits = 2 * (1 - now) * z / now**2 + math.log(p / (1 - p))
        z = z - (now - then) * velocity(z, logits, torch.full((count,), float(now), dtype=torch.float64))
    torch.testing.assert_close(z.abs(), torch.ones_like(z), atol=1e-3, rtol=0)
    assert float((z > 0).double().mean()) == pytest.approx(p, abs=0.03)


def test_the_hull_is_alpha_at_every_projection():
    maps = some_maps(2)
    encoder, flow = randomly(PhotoEncoder(ENCODER)), randomly(OccupancyFlow(FLOW))
    elevations, focals = torch.tensor([0.3, -0.1]), torch.tensor([1.5, 4.0])
    with torch.no_grad():
        lifted = flow.lift(encoder(maps), maps.rgba, elevations, focals)
    seen = project_points(voxel_centers(16), elevations, focals)
    wanted = torch.zeros(2, 1, 16, 16, 16)
    for item in range(2):
        for voxel in range(0, 16**3, 7):
            u, v = ((seen[item, voxel, :2] + 1) * 32 - 0.5).tolist()
            x0, y0 = math.floor(u), math.floor(v)
            total = 0.0
            for y in (y0, y0 + 1):
                for x in (x0, x0 + 1):
                    if 0 <= x < 64 and 0 <= y < 64:
                        total += (1 - abs(u - x)) * (1 - abs(v - y)) * float(maps.rgba[item, 3, y, x])
            wanted.view(2, -1)[item, voxel] = total
    picked = torch.zeros(16**3, dtype=torch.bool)
    picked[::7] = True
    mask = fold(picked.view(1, 1, 16, 16, 16).float())[0] > 0
    torch.testing.assert_close(lifted.fine[:, :8][:, mask], fold(wanted)[:, mask], atol=1e-4, rtol=0)


def test_an_item_without_its_photo_sees_nothing_of_it():
    encoder, flow = randomly(PhotoEncoder(ENCODER)), randomly(OccupancyFlow(FLOW))
    noisy = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    outputs = []
    with torch.no_grad():
        for seed in (0, 9):
            maps = some_maps(2, seed)
            lifted = flow.lift(encoder(maps), maps.rgba, torch.tensor([0.1, 0.2]), torch.tensor([2.0, 3.0]))
            outputs.append(flow(noisy, torch.tensor([0.5, 0.5]), lifted.kept(torch.tensor([0.0, 1.0]))))
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert float((outputs[0][1] - outputs[1][1]).abs().max()) > 1e-3


def test_every_weight_is_learnt():
    encoder, flow = randomly(PhotoEncoder(ENCODER)), randomly(OccupancyFlow(FLOW))
    maps = some_maps(1)
    features = encoder(maps)
    lifted = flow.lift(features, maps.rgba, torch.tensor([0.2]), torch.tensor([2.0]))
    logits = flow(torch.randn(1, 1, 16, 16, 16), torch.tensor([0.7]), lifted)
    depth = torch.full((1, 32, 32), 0.1)
    loss = logits.square().mean() + depth_loss(features, depth).mean()
    (loss + camera_loss(features, torch.tensor([0.1]), torch.tensor([2.0])).mean()).backward()
    missing = [
        name
        for module in (encoder, flow)
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    assert missing == []


def test_depth_loss_is_the_cross_entropy_of_a_two_bin_target():
    features = PhotoEncoder(ENCODER)(some_maps(1))
    logits = torch.randn(1, 6, 32, 32, generator=torch.Generator().manual_seed(2))
    features = type(features)(**{**vars(features), "depth": logits})
    depth = torch.full((1, 32, 32), torch.nan)
    depth[0, 4, 5], depth[0, 20, 1] = 0.07, -0.59
    likely = logits.double().log_softmax(1)
    total = 0.0
    for row, column in ((4, 5), (20, 1)):
        position = (float(depth[0, row, column]) / DEPTH_REACH + 1) / 2 * 6 - 0.5
        position = min(max(position, 0.0), 5.0)
        low = math.floor(position)
        high = min(low + 1, 5)
        total -= float(
            likely[0, low, row, column] * (1 - position + low)
            + likely[0, high, row, column] * (position - low)
        )
    assert float(depth_loss(features, depth)) == pytest.approx(total / 2, rel=1e-5)
