"""gsplat's CUDA rasteriser behind our signature: an explicit choice, to compare with or to fall back on."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from .rasterize_reference import RasterSettings

#: What gsplat compiles in, and what therefore cannot be chosen: the clamp on alpha by minor version, the thresholds.
MAX_ALPHA = {"1.5": 0.999, "1.6": 0.99}
ALPHA_THRESHOLD, TRANSMITTANCE_STOP = 1 / 255, 1e-4


def runs_on(tensor: Tensor) -> bool:
    return tensor.is_cuda


def rasterize_gsplat(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor,
    viewmats: Tensor,
    campos: Tensor,
    Ks: Tensor,
    backgrounds: Tensor | None,
    s: RasterSettings,
) -> tuple[Tensor, Tensor]:
    """Pictures [V, H, W, C (+ 1 with depth)] and alphas [V, H, W]. Shapes as in kernels/rasterize.py.

    Raises:
        RuntimeError: gsplat is not installed, or the tensors are not on a CUDA device.
        ValueError: a setting that gsplat fixes at another value.
    """
    if importlib.util.find_spec("gsplat") is None:
        raise RuntimeError('backend: gsplat is not installed; add it with: pip install "diff2to3[gsplat]"')
    import gsplat

    if not runs_on(means):
        raise RuntimeError(
            "backend: gsplat's kernels need tensors on a CUDA device; use backend='auto' elsewhere"
        )
    version = ".".join(gsplat.__version__.split(".")[:2])
    fixed = {
        "max_alpha": (s.max_alpha, MAX_ALPHA.get(version, s.max_alpha)),
        "alpha_threshold": (s.alpha_threshold, ALPHA_THRESHOLD),
        "transmittance_stop": (s.transmittance_stop, TRANSMITTANCE_STOP),
    }
    for name, (asked, has) in fixed.items():
        if abs(asked - has) > 1e-9:
            raise ValueError(f"{name}: gsplat {gsplat.__version__} fixes it at {has:g}, got {asked:g}")
    if backgrounds is not None and s.with_depth:
        backgrounds = backgrounds[:, :-1]  # gsplat adds the zero for depth itself
    picture, alphas, _ = gsplat.rasterization(
        means,
        quats,
        scales,
        opacities,
        features,
        viewmats,
        Ks,
        s.width,
        s.height,
        near_plane=s.near_plane,
        eps2d=s.eps2d,
        sh_degree=s.sh_degree,
        packed=False,
        backgrounds=backgrounds,
        render_mode="RGB+D" if s.with_depth else "RGB",
        rasterize_mode="antialiased" if s.antialiased else "classic",
    )
    return picture, alphas[..., 0]
