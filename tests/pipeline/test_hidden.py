"""Quiet colours behind: averages against brute force, what stays, and what is taken over from the front."""

import numpy as np
import pytest
import torch

from diff2to3.pipeline.hidden import CELLS, HiddenConfig, grid_sums, quiet_hidden, weighted_mean
from diff2to3.types import Gaussians

Y0 = 0.28209479177387814


def wall(front: torch.Tensor, back: torch.Tensor) -> Gaussians:
    """Two walls of 12 × 12 Gaussians at y = -0.3 (seen) and y = 0.3 (hidden) with colours [144, 3]."""
    axis = torch.linspace(-0.4, 0.4, 12)
    x, z = torch.meshgrid(axis, axis, indexing="ij")
    means = torch.cat(
        [torch.stack([x.flatten(), torch.full((144,), y), z.flatten()], 1) for y in (-0.3, 0.3)]
    )
    colors = torch.cat([front, back])
    quats = torch.tensor([1.0, 0, 0, 0]).expand(288, 4).contiguous()
    sh = ((colors - 0.5) / Y0)[:, None]
    return Gaussians(means, quats, torch.full((288, 3), 0.03), torch.full((288,), 0.9), sh)


SEEN = torch.cat([torch.ones(144), torch.zeros(144)])


def colors_of(gaussians: Gaussians) -> torch.Tensor:
    return gaussians.sh[:, 0] * Y0 + 0.5


def test_sums_are_those_of_every_pair():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(40, 3, generator=generator) * 1.1 - 0.55  # some outside the cube count to its border
    values, weights = torch.randn(40, 2, generator=generator), torch.rand(40, generator=generator)
    reach = (1.0, 4.0, 2.0)
    found = grid_sums(means.double(), values.double(), weights.double(), reach).numpy()
    cells = np.clip(np.floor((means.double().numpy() + 0.5) * CELLS), 0, CELLS - 1)
    for i in range(40):
        kernel = np.exp(-0.5 * (((cells - cells[i]) / reach) ** 2).sum(1)) * weights.double().numpy()
        expected = [*(kernel[:, None] * values.double().numpy()).sum(0), kernel.sum()]
        np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-12)


def test_a_mean_of_equal_values_is_that_value():
    means = torch.rand(30, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    mean = weighted_mean(means, torch.full((30, 3), 0.7), torch.rand(30), (1.0, 1.0, 1.0))
    torch.testing.assert_close(mean, torch.full((30, 3), 0.7))


def test_the_back_takes_the_fronts_colours_at_its_place_and_loses_its_noise():
    top = torch.arange(144) % 12 >= 6
    front = torch.where(top[:, None], torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9]))
    noise = torch.rand(144, 3, generator=torch.Generator().manual_seed(2))
    quiet = colors_of(quiet_hidden(wall(front, noise), SEEN))
    torch.testing.assert_close(quiet[:144], front, atol=1e-5, rtol=0)  # what is seen stays
    back = quiet[144:]
    rows = torch.arange(144) % 12
    high, low = back[rows >= 10].mean(0), back[rows <= 1].mean(0)
    assert high[0] > low[0] + 0.3 and low[2] > high[2] + 0.3
    # differences of hue from one Gaussian to the next are gone, some of light and dark is kept
    hue = back - back.mean(1, keepdim=True)
    before = noise - noise.mean(1, keepdim=True)
    assert (hue[1:] - hue[:-1])[::12].abs().mean() < 0.15 * (before[1:] - before[:-1])[::12].abs().mean()
    plain = quiet_hidden(wall(front, noise), SEEN, HiddenConfig(detail=0.0))
    light = (back - colors_of(plain)[144:]).mean(1)
    assert 0.02 < float(light.std()) < float(noise.mean(1).std())


@pytest.mark.parametrize("seen", [SEEN, torch.zeros(288)])
def test_nothing_changes_where_it_should_not(seen):
    gaussians = wall(torch.full((144, 3), 0.2), torch.full((144, 3), 0.6))
    config = HiddenConfig(share=0.0) if seen is SEEN else None  # nothing is seen: nothing to take over
    assert quiet_hidden(gaussians, seen, config) is gaussians


def test_only_colours_change():
    gaussians = wall(torch.full((144, 3), 0.2), torch.full((144, 3), 0.6))
    quiet = quiet_hidden(gaussians, SEEN)
    for name in ("means", "quats", "scales", "opacities"):
        assert torch.equal(getattr(quiet, name), getattr(gaussians, name))
    assert 0.2 < float(colors_of(quiet)[144:].mean()) < 0.4


def test_what_the_photo_glimpses_stays():
    """A Gaussian between others is seen a little; the photo says what colour it has."""
    gaussians = wall(torch.full((144, 3), 0.2), torch.full((144, 3), 0.6))
    glimpsed = SEEN.clone()
    glimpsed[144:200] = 0.2
    quiet = quiet_hidden(gaussians, glimpsed)
    assert torch.equal(quiet.sh[144:200], gaussians.sh[144:200])
    assert float((quiet.sh[200:] - gaussians.sh[200:]).abs().min()) > 0.1
