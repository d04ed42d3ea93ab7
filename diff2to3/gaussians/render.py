"""Pictures of Gaussians with the filter the models are trained with (paper section 3.3, mip-splatting)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.kernels.library import TooManyError
from diff2to3.kernels.rasterize import Rendering, rasterize
from diff2to3.types import Gaussians

#: Variance in px² of the screen filter that 2to3-VAE and TRELLIS train with; opacities are compensated for it.
EPS2D = 0.1
#: Views that :func:`render_pictures` renders at once, so that memory does not grow with their number.
BATCH = 4


def render(
    gaussians: Gaussians,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    background: Tensor | float | None = None,
    depth: bool = False,
    eps2d: float = EPS2D,
    antialiased: bool = True,
    backend: str = "auto",
) -> Rendering:
    """Render into V views: colours [V, H, W, 3] sRGB-encoded, alphas [V, H, W], depths on request. Differentiable.

    Args:
        viewmats: [V, 4, 4] world -> camera. Ks: [V, 3, 3] in pixels.
        background: a grey level, [3] or [V, 3]; black if None.
        depth: also Σ weight · z, in object units.
        backend: ``auto``, ``native``, ``reference`` or ``gsplat``, see
            :func:`diff2to3.kernels.rasterize.rasterize`.

    Raises InputError for a picture in which Gaussians overlap 2^31 tiles or more. Where only all views together do,
    they are rendered in parts.
    """
    if isinstance(background, int | float):
        background = gaussians.means.new_full((3,), float(background))
    options: dict[str, Any] = {"depth": depth, "eps2d": eps2d, "antialiased": antialiased, "backend": backend}
    try:
        return _rasterize(gaussians, viewmats, Ks, width, height, background, options)
    except TooManyError as error:
        if len(viewmats) == 1:
            raise InputError(
                f"{len(gaussians):,} Gaussians overlap more than 2^31 tiles of 16 x 16 pixels in one picture of "
                f"{width} x {height}: make the picture smaller, or take out Gaussians that fill all of it"
            ) from error
    half = len(viewmats) // 2
    backgrounds: list[Tensor | None] = [background, background]
    if background is not None and background.ndim == 2:
        backgrounds = [background[:half], background[half:]]
    parts = [
        render(gaussians, viewmats[rows], Ks[rows], width, height, background=colors, **options)
        for rows, colors in zip((slice(half), slice(half, None)), backgrounds, strict=True)
    ]
    colors, alphas = torch.cat([part.colors for part in parts]), torch.cat([part.alphas for part in parts])
    depths = [part.depths for part in parts if part.depths is not None]
    return Rendering(colors, alphas, torch.cat(depths) if depths else None)


def _rasterize(
    gaussians: Gaussians,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    background: Tensor | None,
    options: dict[str, Any],
) -> Rendering:
    return rasterize(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        viewmats,
        Ks,
        width,
        height,
        sh=gaussians.sh,
        backgrounds=background,
        **options,
    )


@torch.no_grad()
def render_pictures(
    gaussians: Gaussians,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    background: Tensor | float = 1.0,
    eps2d: float = EPS2D,
) -> tuple[Tensor, Tensor]:
    """As :func:`render`, a few views at a time and as a picture file would hold them.

    Returns:
        images [V, H, W, 3] over ``background`` and alphas [V, H, W], both clipped to [0, 1] (colours from spherical
        harmonics may exceed 1), on the device of ``gaussians``.
    """
    device, parts = gaussians.means.device, []
    for some_viewmats, some_Ks in zip(viewmats.split(BATCH), Ks.split(BATCH), strict=True):
        cameras = some_viewmats.to(device), some_Ks.to(device), width, height
        parts.append(render(gaussians, *cameras, background=background, eps2d=eps2d))
    images, alphas = torch.cat([p.colors for p in parts]), torch.cat([p.alphas for p in parts])
    return images.clamp(0, 1), alphas.clamp(0, 1)


def to_uint8(colors: Tensor) -> Tensor:
    """Colours in [0, 1] (clamped) as bytes."""
    return (colors.detach().clamp(0, 1) * 255).round().to(torch.uint8)
