"""Image metrics against scikit-image, torchmetrics, published values and one-line references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diff2to3.metrics.image import (
    MAX_PSNR,
    ciede2000,
    delta_e_2000,
    foreground_psnr,
    psnr,
    srgb_to_lab,
    ssim,
)

#: Sharma, Wu & Dalal (2005), table 1: two CIELAB colours and their ΔE00.
SHARMA = """
50 2.6772 -79.7751 50 0 -82.7485 2.0425
50 3.1571 -77.2803 50 0 -82.7485 2.8615
50 2.8361 -74.0200 50 0 -82.7485 3.4412
50 -1.3802 -84.2814 50 0 -82.7485 1.0000
50 -1.1848 -84.8006 50 0 -82.7485 1.0000
50 -0.9009 -85.5211 50 0 -82.7485 1.0000
50 0 0 50 -1 2 2.3669
50 -1 2 50 0 0 2.3669
50 2.49 -0.001 50 -2.49 0.0009 7.1792
50 2.49 -0.001 50 -2.49 0.0010 7.1792
50 2.49 -0.001 50 -2.49 0.0011 7.2195
50 2.49 -0.001 50 -2.49 0.0012 7.2195
50 -0.001 2.49 50 0.0009 -2.49 4.8045
50 -0.001 2.49 50 0.0010 -2.49 4.8045
50 -0.001 2.49 50 0.0011 -2.49 4.7461
50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492
50 2.5 0 61 -5 29 22.8977
50 2.5 0 56 -27 -3 31.9030
50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1.0000
50 2.5 0 50 3.2972 0 1.0000
50 2.5 0 50 1.8634 0.5757 1.0000
50 2.5 0 50 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.rand(3, 24, 31, 3, generator=generator)
    return images, (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def test_psnr_is_its_definition(pair):
    for x, y, value in zip(*pair, psnr(*pair).tolist(), strict=True):
        mse = np.mean((x.double().numpy() - y.double().numpy()) ** 2)
        assert value == pytest.approx(-10 * np.log10(mse), rel=1e-12)
    one = torch.zeros(1, 8, 8, 3)
    assert psnr(one, one + 0.1).item() == pytest.approx(20, abs=1e-4)


def test_psnr_of_equal_images_is_finite(pair):
    assert psnr(pair[0], pair[0]).tolist() == [MAX_PSNR] * 3
    assert psnr(pair[0], (pair[0] - 1e-9).clamp(min=0)).max() <= MAX_PSNR


def test_psnr_and_ssim_agree_with_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    for x, y, ours, similarity in zip(*pair, psnr(*pair), ssim(*pair, "valid"), strict=True):
        x, y = x.double().numpy(), y.double().numpy()
        assert ours.item() == pytest.approx(metrics.peak_signal_noise_ratio(y, x, data_range=1), rel=1e-9)
        reference = metrics.structural_similarity(
            x, y, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert similarity.item() == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("border", ["same", "valid"])
def test_ssim_by_brute_force(generator, border):
    x, y = torch.rand(2, 1, 12, 13, 3, generator=generator, dtype=torch.float64)
    pad = 5 if border == "same" else 0
    padded = [np.pad(t[0].numpy(), ((pad, pad), (pad, pad), (0, 0))) for t in (x, y)]
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for row, column, channel in np.ndindex(2 + 2 * pad, 3 + 2 * pad, 3):
        a, b = (p[row : row + 11, column : column + 11, channel] for p in padded)
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
        cov = (window * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(x, y, border).item() == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_equal_and_flat_images():
    flat = torch.full((2, 16, 16, 3), 0.3)
    assert ssim(flat, flat).tolist() == pytest.approx([1, 1])


def test_foreground_psnr_counts_the_mask_only(pair):
    x, y = pair
    mask = torch.zeros(x.shape[:3], dtype=torch.bool)
    mask[0, 3:7, 4:9] = True
    mask[1] = True
    value = foreground_psnr(x, y, mask)
    inside = (x[0, 3:7, 4:9].double() - y[0, 3:7, 4:9].double()).square().mean()
    assert value[0].item() == pytest.approx(-10 * inside.log10().item(), rel=1e-12)
    assert value[1].item() == pytest.approx(psnr(x, y)[1].item(), rel=1e-12)
    assert bool(value[2].isnan())


def test_ciede2000_gives_the_published_values():
    rows = torch.tensor(
        [[float(v) for v in line.split()] for line in SHARMA.split("\n") if line], dtype=torch.float64
    )
    assert len(rows) == 34
    for first, second in ((rows[:, :3], rows[:, 3:6]), (rows[:, 3:6], rows[:, :3])):
        torch.testing.assert_close(delta_e_2000(first, second), rows[:, 6], rtol=0, atol=5.1e-5)


def test_colours_agree_with_scikit_image(pair):
    color = pytest.importorskip("skimage.color")
    x, y = (t.double() for t in pair)
    lab = color.rgb2lab(x.numpy())
    np.testing.assert_allclose(srgb_to_lab(x).numpy(), lab, atol=2e-2)  # its matrix is rounded more
    reference = color.deltaE_ciede2000(srgb_to_lab(x).numpy(), srgb_to_lab(y).numpy())
    np.testing.assert_allclose(ciede2000(x, y).numpy(), reference.mean((1, 2)), rtol=1e-9)


def test_ciede2000_of_known_colours():
    white, black = torch.ones(1, 4, 4, 3), torch.zeros(1, 4, 4, 3)
    torch.testing.assert_close(srgb_to_lab(white)[0, 0, 0], torch.tensor([100.0, 0, 0]), atol=1e-3, rtol=0)
    assert ciede2000(white, black).item() == pytest.approx(100, abs=1e-3)
    assert ciede2000(white, white).item() == 0
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert bool(ciede2000(white, black, mask).isnan().all())


@pytest.mark.parametrize("metric", [psnr, ssim, ciede2000])
def test_bad_images_are_refused_by_name(metric, pair):
    x, y = pair
    with pytest.raises(ValueError, match=r"differ in size.*same resolution"):
        metric(x, y[:, :20])
    with pytest.raises(ValueError, match=r"differ in size"):
        metric(x, y[:2])
    broken = y.clone()
    broken[1, 2, 3, 0] = float("nan")
    with pytest.raises(ValueError, match="targets: NaN or infinite pixels in view 1"):
        metric(x, broken)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got .* to 255"):
        metric(x * 0 + 255, y)
    with pytest.raises(ValueError, match="images: expected a floating-point dtype"):
        metric((x * 255).byte(), y)
    with pytest.raises(ValueError, match=r"images: expected images \[V, H, W, 3\]"):
        metric(x[0], y)


def test_ssim_needs_a_window():
    tiny = torch.zeros(1, 8, 32, 3)
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 32 x 8"):
        ssim(tiny, tiny)
    with pytest.raises(ValueError, match="border"):
        ssim(tiny, tiny, "reflect")
