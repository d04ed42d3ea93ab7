"""Gaussians and voxels for the tests on a GPU, and how results are compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diff2to3.kernels.rasterize import rasterize


def cloud(
    g: int,
    views: int,
    width: int,
    height: int,
    *,
    terms: int = 0,
    channels: int = 0,
    per_view: bool = False,
    scale: float = 0.06,
) -> dict[str, Tensor]:
    """Gaussians seen from around them, with SH coefficients (``terms``) or plain colours (``channels``)."""
    rng = torch.Generator().manual_seed(g + 7 * terms + channels)
    viewmats, Ks = torch.eye(4).repeat(views, 1, 1), torch.zeros(views, 3, 3)
    for v in range(views):
        c, s = math.cos(0.4 + v), math.sin(0.4 + v)
        viewmats[v, :3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        viewmats[v, :3, 3] = torch.tensor([0.02, -0.03, 2.0])
        Ks[v] = torch.tensor([[1.5 * width, 0, 0.52 * width], [0, 1.4 * width, 0.47 * height], [0, 0, 1]])
    shape = (g, terms, 3) if terms else (views, g, channels) if per_view else (g, channels)
    return {
        "means": torch.rand(g, 3, generator=rng) - 0.5,
        "quats": torch.randn(g, 4, generator=rng),
        "scales": scale * torch.exp(0.5 * torch.randn(g, 3, generator=rng)),
        "opacities": 0.05 + 0.9 * torch.rand(g, generator=rng),
        "viewmats": viewmats,
        "sh" if terms else "colors": 0.4 * torch.randn(shape, generator=rng),
        "backgrounds": torch.rand(views, 3 if terms else channels, generator=rng),
        "Ks": Ks,
    }


def rendered(
    scene: dict[str, Tensor],
    width: int,
    height: int,
    device: torch.device | str,
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, Tensor]:
    """Pictures, and the gradients of a fixed weighted sum of them with respect to everything but ``Ks``."""
    leaves = {k: t.detach().to(device, dtype).requires_grad_(k != "Ks") for k, t in scene.items()}
    out = rasterize(**leaves, width=width, height=height, **options)  # type: ignore[arg-type]
    results = {name: t for name, t in out._asdict().items() if t is not None}
    total = torch.zeros((), dtype=dtype, device=device)
    for k, picture in enumerate(results.values()):
        weights = torch.randn(picture.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        total = total + (picture * weights.to(picture)).sum()
    names = [name for name in leaves if name != "Ks"]
    gradients = torch.autograd.grad(total, [leaves[name] for name in names])
    results |= {f"v_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def shell(count: int, resolution: int, items: int = 1, seed: int = 0) -> Tensor:
    """The cells [count, 4] nearest to bumpy spheres, one an item, in random order."""
    rng = torch.Generator().manual_seed(seed)
    axis = (torch.arange(resolution) + 0.5) / resolution - 0.5
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = (x * x + y * y + z * z).sqrt()
    parts = []
    for item in range(items):
        distance = (
            radius - 0.36 - 0.1 * torch.sin((7 + item) * x) * torch.sin(9 * y) * torch.sin(11 * z)
        ).abs()
        cells = torch.stack(
            torch.unravel_index(distance.flatten().argsort()[: count // items], distance.shape), 1
        )
        parts.append(torch.nn.functional.pad(cells, (1, 0), value=item))
    coords = torch.cat(parts).int()
    return coords[torch.randperm(len(coords), generator=rng)]


def relative_error(a: Tensor, b: Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], reference) for name, reference in expected.items()}
    assert max(errors.values()) <= tolerance, errors


def check_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
