"""The Gaussian rasteriser: a bumpy shell at three sizes, forward and backward, SH degree 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from diff2to3.kernels.rasterize import rasterize

from .common import Config, Row, copy_bandwidth, interleaved_medians

#: (Gaussians, pixels a side). The reference is left out where it would take minutes.
CPU_CASES = ((5_000, 256), (50_000, 512), (200_000, 512))
CUDA_CASES = ((50_000, 512), (200_000, 512), (1_000_000, 512))
SLOW_ROUNDS = 1

Scene = dict[str, Tensor]


def bumpy_shell(num_gaussians: int, device: torch.device) -> Scene:
    """Gaussians on a sphere of radius 0.4 with bumps; their mean scale is 0.6 of the spacing between them."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(num_gaussians, 3, generator=rng), dim=1)
    radius = 0.4 + 0.03 * torch.sin(9 * directions).prod(1, keepdim=True)
    spacing = math.sqrt(4 * math.pi * 0.4**2 / num_gaussians)
    scene = {
        "means": directions * radius,
        "quats": torch.randn(num_gaussians, 4, generator=rng),
        "scales": 0.6 * spacing * torch.exp(0.3 * torch.randn(num_gaussians, 3, generator=rng)),
        "opacities": 0.15 + 0.8 * torch.rand(num_gaussians, generator=rng),
        "sh": 0.1 * torch.randn(num_gaussians, 16, 3, generator=rng),
    }
    return {name: tensor.to(device).requires_grad_() for name, tensor in scene.items()}


def camera(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Field of view 40°, two units from the centre."""
    focal = size / 2 / math.tan(math.radians(20))
    viewmat = torch.eye(4)
    viewmat[2, 3] = 2
    K = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    return viewmat[None].to(device), K[None].to(device)


def run(config: Config) -> list[Row]:
    rows = []
    bandwidth = copy_bandwidth(config)
    for num_gaussians, size in CUDA_CASES if config.device.type == "cuda" else CPU_CASES:
        rows += run_case(num_gaussians, size, config, bandwidth)
    return rows


def run_case(num_gaussians: int, size: int, config: Config, bandwidth: float) -> list[Row]:
    """Forward and backward rows. The backward of each contender is timed on a graph made outside the clock."""
    scene = bumpy_shell(num_gaussians, config.device)
    viewmats, Ks = camera(size, config.device)
    v_colors = torch.rand(1, size, size, 3, device=config.device)
    renderers, notes = contenders(config, num_gaussians)
    forward = {name: forward_only(render, scene, viewmats, Ks, size) for name, render in renderers.items()}
    slow = {name: SLOW_ROUNDS for name in renderers if name != "ours" and config.device.type == "cpu"}
    forward_ms = interleaved_medians(forward, config, slow)
    graphs = {name: render(scene, viewmats, Ks, size) for name, render in renderers.items()}

    def backward(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(graphs[name], list(scene.values()), v_colors, retain_graph=True)

    backward_ms = interleaved_medians({name: backward(name) for name in renderers}, config, slow)
    # Each input read and each output written once: parameters and picture, and their gradients on the way back.
    parameter_bytes, picture_bytes = num_gaussians * 59 * 4, size * size * 3 * 4
    label = f"rasterize {num_gaussians // 1000}k @ {size}²"
    out = []
    for kind, ms, moved in (
        ("forward", forward_ms, parameter_bytes + picture_bytes),
        ("backward", backward_ms, 2 * parameter_bytes + picture_bytes),
    ):
        peers = {name: t for name, t in ms.items() if name != "ours"}
        out.append(Row(f"{label} {kind}", ms["ours"], peers, 1e3 * moved / bandwidth, "bytes moved", notes))
    return out


def forward_only(
    render: Callable[[Scene, Tensor, Tensor, int], Tensor],
    scene: Scene,
    viewmats: Tensor,
    Ks: Tensor,
    size: int,
) -> Callable[[], object]:
    """With the graph recorded, as training needs it."""
    return lambda: render(scene, viewmats, Ks, size)


def contenders(
    config: Config, num_gaussians: int
) -> tuple[dict[str, Callable[[Scene, Tensor, Tensor, int], Tensor]], tuple[str, ...]]:
    """What runs here, and a line for each peer that does not."""
    found: dict[str, Callable[[Scene, Tensor, Tensor, int], Tensor]] = {"ours": with_backend("native")}
    notes = []
    if (
        num_gaussians <= 50_000 and config.device.type == "cpu"
    ):  # on a GPU it waits a thousand times a picture
        found["our reference"] = with_backend("reference")
    if find_spec("gsplat") is None:
        notes.append('gsplat: not installed: pip install "diff2to3[gsplat]"')
    elif config.device.type == "cuda":
        found["gsplat"] = with_backend("gsplat")
    else:
        found["gsplat (torch)"] = gsplat_on_cpu
    return found, tuple(notes)


def with_backend(backend: str) -> Callable[[Scene, Tensor, Tensor, int], Tensor]:
    def render(scene: Scene, viewmats: Tensor, Ks: Tensor, size: int) -> Tensor:
        geometry = [scene[name] for name in ("means", "quats", "scales", "opacities")]
        return rasterize(*geometry, viewmats, Ks, size, size, sh=scene["sh"], backend=backend).colors

    return render


def gsplat_on_cpu(scene: Scene, viewmats: Tensor, Ks: Tensor, size: int) -> Tensor:
    from .gsplat_peer import gsplat_reference

    return gsplat_reference(**scene, viewmats=viewmats, Ks=Ks, width=size, height=size)[0]
