"""Random and hostile scenes for the rasteriser, forward and backward."""

from __future__ import annotations

import torch
from draw import EXTREMES, NOT_FINITE, chance, choice, integer, normal, spoil
from torch import Tensor

from diff2to3.kernels.library import KernelError, resolve_backend
from diff2to3.kernels.rasterize import blending_weights, rasterize


def draw_scene(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gaussians around the origin and cameras around, or inside, them."""
    g = choice(generator, (0, 1, 2, 7, 8, 9, 31, 64, 300))
    spread = choice(generator, (0.0, 0.2, 1.0, 10.0))
    views = integer(generator, 0, 3) if chance(generator, 0.3) else 1
    viewmats = torch.eye(4).repeat(views, 1, 1)
    rotation, _ = torch.linalg.qr(normal(generator, views, 3, 3))
    viewmats[:, :3, :3] = rotation
    viewmats[:, 2, 3] = float(choice(generator, (0.0, 0.5, 2.0, 50.0)))
    Ks = torch.zeros(views, 3, 3)
    Ks[:, 0, 0] = Ks[:, 1, 1] = float(choice(generator, (0.5, 20.0, 60.0, 5000.0)))
    Ks[:, 0, 2], Ks[:, 1, 2], Ks[:, 2, 2] = 10.0, 10.0, 1.0
    scale = float(choice(generator, (1e-6, 0.02, 0.3, 100.0)))
    scene = {
        "means": normal(generator, g, 3) * spread,
        "quats": normal(generator, g, 4),
        "scales": torch.rand(g, 3, generator=generator) * scale,
        "opacities": torch.rand(g, generator=generator),
        "viewmats": viewmats,
        "Ks": Ks,
    }
    return {name: tensor.to(dtype) for name, tensor in scene.items()}


def on_cpu() -> bool:
    """Whether these are the CPU's kernels, which alone have float64."""
    return resolve_backend("auto", torch.device("cpu"), torch.float64) == "native"


def draw_settings(generator: torch.Generator) -> dict[str, float | bool]:
    return {
        "eps2d": choice(generator, (0.0, 0.1, 0.3, 1e6)),
        "antialiased": chance(generator, 0.5),
        "near_plane": choice(generator, (0.0, 0.01, 1.0)),
        "max_alpha": choice(generator, (0.99, 0.999, 1.0)),
        "alpha_threshold": choice(generator, (0.0, 1 / 255)),
        "transmittance_stop": choice(generator, (0.0, 1e-4)),
    }


def draw_colors(generator: torch.Generator, g: int, views: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if chance(generator, 0.5):
        return {"sh": normal(generator, g, choice(generator, (1, 4, 9, 16)), 3, dtype=dtype)}
    channels = choice(generator, (1, 2, 3, 4, 5, 8, 16, 17, 31, 32))
    shape = (views, g, channels) if chance(generator, 0.5) else (g, channels)
    return {"colors": normal(generator, *shape, dtype=dtype)}


def draw_and_render(generator: torch.Generator, values: tuple[float, ...], share: float) -> str:
    """One forward and backward call; ``share`` of every tensor's entries become one of ``values``."""
    dtype = torch.float64 if chance(generator, 0.3) and on_cpu() else torch.float32
    scene = draw_scene(generator, dtype)
    views = scene["viewmats"].shape[0]
    paint = draw_colors(generator, scene["means"].shape[0], views, dtype)
    tensors = {name: spoil(generator, tensor, values, share) for name, tensor in (scene | paint).items()}
    if chance(generator, 0.7):  # hostile Gaussians before sane cameras: these get through the checks
        tensors |= {name: scene[name] for name in ("viewmats", "Ks")}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != "Ks")
    width, height = (int(choice(generator, (1, 2, 15, 16, 17, 33, 70))) for _ in range(2))
    depth = chance(generator, 0.4)
    paint_name = next(iter(paint))
    channels = 3 if paint_name == "sh" else paint[paint_name].shape[-1]
    backgrounds = normal(generator, views, channels, dtype=dtype) if chance(generator, 0.5) else None
    try:
        out = rasterize(
            **tensors,
            width=width,
            height=height,
            backgrounds=backgrounds,
            depth=depth,
            **draw_settings(generator),
            backend="native",
        )
    except ValueError:
        return "refused"
    except KernelError:
        return "failed"
    parts = [out.colors.sum(), out.alphas.sum(), *([out.depths.sum()] if out.depths is not None else [])]
    sum(parts[: integer(generator, 1, len(parts))]).backward()
    finite = all(bool(torch.isfinite(part).all()) for part in (out.colors, out.alphas))
    return "rendered" if finite else "rendered with overflow"


def render_random(generator: torch.Generator) -> str:
    return draw_and_render(generator, EXTREMES, 0.0)


def render_extreme(generator: torch.Generator) -> str:
    return draw_and_render(generator, EXTREMES, choice(generator, (0.01, 0.1, 0.9)))


def render_not_finite(generator: torch.Generator) -> str:
    return draw_and_render(generator, NOT_FINITE, choice(generator, (0.001, 0.01, 0.1)))


def weigh_pixels(generator: torch.Generator) -> str:
    scene = draw_scene(generator, torch.float32)
    size = (scene["viewmats"].shape[0], integer(generator, 1, 40), integer(generator, 1, 40))
    masks = normal(generator, *size, *([integer(generator, 1, 32)] if chance(generator, 0.5) else []))
    blending_weights(**scene, masks=masks, backend="native")
    return "summed"


CASES = [render_random, render_extreme, render_not_finite, weigh_pixels]
