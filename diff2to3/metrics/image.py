"""Metrics of pairs of images: one number a view.

Images are [V, H, W, 3], sRGB-encoded in [0, 1], already over their background. Anything else (another shape,
NaN, values outside [0, 1]) is a ValueError, so that a broken rendering cannot turn into a score.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: PSNR of equal images, and the largest one reported: a mean over views would be infinite otherwise. It is
#: that of a mean squared error of 1e-10, far below what 8 bits can show (48 dB for one level everywhere).
MAX_PSNR = 100.0
#: Side of SSIM's window (Wang et al. 2004): Gaussian, σ = 1.5.
SSIM_WINDOW = 11
_TOLERANCE = 1e-4  # rounding of a renderer's blending


def check_images(name: str, images: Tensor) -> None:
    """ValueError that names ``name`` unless ``images`` is what this module takes."""
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"{name}: expected images [V, H, W, 3], got {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype in [0, 1], got {images.dtype}")
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(f"{name}: NaN or infinite pixels in view {int(bad.nonzero()[0])}")
    low, high = float(images.detach().min()), float(images.detach().max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(f"{name}: expected values in [0, 1], got {low:.4g} to {high:.4g}")


def check_pair(images: Tensor, targets: Tensor) -> None:
    """ValueError unless both are images of one size."""
    check_images("images", images)
    check_images("targets", targets)
    if images.shape != targets.shape:
        raise ValueError(
            f"images and targets differ in size: {list(images.shape)} and {list(targets.shape)}; "
            "render both at the same resolution and from the same views"
        )


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all pixels and channels: [V], at most :data:`MAX_PSNR`."""
    check_pair(images, targets)
    return _decibels((images.double() - targets.double()).square().flatten(1).mean(1))


def foreground_psnr(images: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """PSNR over the pixels of ``masks`` (bool [V, H, W]) only: [V]; NaN for a view whose mask is empty.

    The background of a rendered object is easy and large; this is the number without it.
    """
    check_pair(images, targets)
    if masks.shape != images.shape[:-1] or masks.dtype != torch.bool:
        raise ValueError(
            f"masks: expected bool {list(images.shape[:-1])}, got {masks.dtype} {list(masks.shape)}"
        )
    errors = (images.double() - targets.double()).square().mean(-1)
    counts = masks.flatten(1).sum(1)
    return _decibels((errors * masks).flatten(1).sum(1) / counts)  # 0 / 0 is NaN


def _decibels(mse: Tensor) -> Tensor:
    """-10 log10 of mean squared errors [V] of signals whose peak is 1; NaN stays NaN."""
    return -10 * torch.log10(mse.clamp(min=10 ** (-MAX_PSNR / 10)))


def ssim(images: Tensor, targets: Tensor, border: str = "same") -> Tensor:
    """Structural similarity (Wang et al. 2004), mean over pixels and channels: [V].

    Gaussian window of 11 with σ = 1.5, K1 = 0.01, K2 = 0.03. Libraries differ, and have changed, in what they do
    at the border; here it is said:

    border  "same": a value for every pixel, with zeros around the image, as the published code of TRELLIS and
            3DGS has it; "valid": only windows that lie inside, as Wang et al. and scikit-image have it
    """
    check_pair(images, targets)
    if border not in ("same", "valid"):
        raise ValueError(f"border: expected same or valid, got {border!r}")
    if min(images.shape[1:3]) < SSIM_WINDOW:
        height, width = images.shape[1:3]
        raise ValueError(f"images: SSIM needs at least {SSIM_WINDOW} pixels a side, got {width} x {height}")
    pad = SSIM_WINDOW // 2
    offsets = torch.arange(-pad, pad + 1, dtype=torch.float64)
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights = (line / line.sum()).tolist()
    views = (t.double().permute(0, 3, 1, 2) for t in (images, targets))
    # A view at a time: its sums then stay in the cache, which is most of the time.
    return torch.stack(
        [_ssim_of(x, y, weights, pad if border == "same" else 0) for x, y in zip(*views, strict=True)]
    )


def _ssim_of(x: Tensor, y: Tensor, weights: list[float], pad: int) -> Tensor:
    """SSIM of pictures [C, H, W], with ``pad`` zeros around them: []."""

    def blur(x: Tensor) -> Tensor:  # the window is a product of two lines
        return _slide(_slide(F.pad(x, (pad,) * 4), weights, 1), weights, 2)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).mean()


def _slide(x: Tensor, weights: list[float], dim: int) -> Tensor:
    """Σ_k weights[k] · x[k:], along ``dim``: conv2d in float64 takes five times as long."""
    size = x.shape[dim] - len(weights) + 1
    total = x.narrow(dim, 0, size) * weights[0]
    for k, weight in enumerate(weights[1:], 1):
        total = total.add(x.narrow(dim, k, size), alpha=weight)
    return total


def ciede2000(images: Tensor, targets: Tensor, masks: Tensor | None = None) -> Tensor:
    """Mean colour difference ΔE00 over all pixels, or those of ``masks`` (bool [V, H, W]): [V].

    0 is equal, about 1 is just noticeable. NaN for a view whose mask is empty.
    """
    check_pair(images, targets)
    if masks is not None and masks.shape != images.shape[:-1]:
        raise ValueError(f"masks: expected {list(images.shape[:-1])}, got {list(masks.shape)}")
    means = []
    for view in range(len(images)):
        chosen = ... if masks is None else masks[view]
        x, y = images[view][chosen].double(), targets[view][chosen].double()
        means.append(delta_e_2000(srgb_to_lab(x), srgb_to_lab(y)).mean())  # of nothing: NaN
    return torch.stack(means)


#: Linear sRGB → XYZ, and the white point it belongs to (D65, 2°; IEC 61966-2-1).
_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)


def srgb_to_lab(colors: Tensor) -> Tensor:
    """sRGB-encoded colours [..., 3] in [0, 1] → CIELAB [..., 3], D65."""
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_XYZ, dtype=colors.dtype, device=colors.device)
    xyz = linear @ matrix.T / matrix.sum(1)  # white maps to 1
    delta = 6 / 29
    f = torch.where(xyz > delta**3, xyz.clamp(min=delta**3) ** (1 / 3), xyz / (3 * delta**2) + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e_2000(lab: Tensor, other: Tensor) -> Tensor:
    """CIEDE2000 between CIELAB colours [..., 3]: [...]. Formula and symbols of Sharma, Wu & Dalal (2005)."""
    (l1, a1, b1), (l2, a2, b2) = lab.unbind(-1), other.unbind(-1)
    mean_c = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    g = 0.5 * (1 - _ratio_to_25(mean_c))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = _hue(a1, b1), _hue(a2, b2)
    gray = c1 * c2 == 0
    turn = h2 - h1
    turn = torch.where(turn > 180, turn - 360, torch.where(turn < -180, turn + 360, turn))
    turn = torch.where(gray, torch.zeros_like(turn), turn)
    d_l, d_c = l2 - l1, c2 - c1
    d_h = 2 * torch.sqrt(c1 * c2) * torch.sin(torch.deg2rad(turn / 2))

    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    total = h1 + h2
    wrapped = torch.where(total < 360, total + 360, total - 360)
    mean_h = torch.where((h1 - h2).abs() <= 180, total, wrapped) / 2
    mean_h = torch.where(gray, total, mean_h)
    t = 1 - 0.17 * _cos(mean_h - 30) + 0.24 * _cos(2 * mean_h)
    t = t + 0.32 * _cos(3 * mean_h + 6) - 0.20 * _cos(4 * mean_h - 63)
    lightness = (mean_l - 50).square()
    s_l = 1 + 0.015 * lightness / torch.sqrt(20 + lightness)
    s_c, s_h = 1 + 0.045 * mean_c, 1 + 0.015 * mean_c * t
    rotation = 30 * torch.exp(-(((mean_h - 275) / 25).square()))
    r_t = -2 * _ratio_to_25(mean_c) * torch.sin(torch.deg2rad(2 * rotation))
    squares = (d_l / s_l).square() + (d_c / s_c).square() + (d_h / s_h).square()
    return torch.sqrt((squares + r_t * (d_c / s_c) * (d_h / s_h)).clamp(min=0))


def _ratio_to_25(chroma: Tensor) -> Tensor:
    power = chroma**7
    return torch.sqrt(power / (power + 25**7))


def _hue(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees in [0, 360); 0 for gray."""
    return torch.rad2deg(torch.atan2(b, a)) % 360


def _cos(degrees: Tensor) -> Tensor:
    return torch.cos(degrees * (math.pi / 180))
