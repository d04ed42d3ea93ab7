"""The rasteriser on a GPU: against the CPU kernel, the float64 reference and gsplat; the same at every run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diff2to3.kernels.rasterize import blending_weights, rasterize

from gpu_scenes import check_close, check_same, cloud, relative_error, rendered  # isort: skip

pytestmark = pytest.mark.cuda

CASES: dict[str, dict[str, Any]] = {
    "degree_0": dict(g=60, views=1, terms=1),
    "degree_1_two_views": dict(g=40, views=2, terms=4),
    "degree_2": dict(g=40, views=1, terms=9),
    "degree_3_antialiased": dict(g=60, views=2, terms=16, antialiased=True, eps2d=0.1),
    "one_channel_and_depth": dict(g=40, views=1, channels=1, depth=True),
    "five_channels_a_view": dict(g=40, views=2, channels=5, per_view=True),
    "12_channels": dict(g=40, views=1, channels=12),
    "32_channels_and_depth": dict(g=30, views=1, channels=32, depth=True),
    "many_layers": dict(g=300, views=1, terms=1),
    "one_gaussian": dict(g=1, views=1, terms=1),
}
MADE = ("g", "views", "terms", "channels", "per_view")


@pytest.mark.parametrize("case", CASES)
def test_tiny_scenes(case: str, device: torch.device) -> None:
    """Also what compute-sanitizer runs (tests/gpu/run.py): forward and backward of every kind of input."""
    made = {name: value for name, value in CASES[case].items() if name in MADE}
    options = {name: value for name, value in CASES[case].items() if name not in MADE}
    width, height = 37, 21  # three tiles by two, none of them full at the right and below
    scene = cloud(width=width, height=height, **made)
    args = (scene, width, height)
    found = rendered(*args, device, torch.float32, backend="native", **options)
    check_same(found, rendered(*args, device, torch.float32, backend="native", **options))
    check_close(found, rendered(*args, "cpu", torch.float32, backend="native", **options), 1e-4)
    check_close(found, rendered(*args, "cpu", torch.float64, backend="reference", **options), 2e-3)


@pytest.mark.parametrize("g, views", [(0, 1), (5, 0), (0, 0)])
def test_nothing_to_draw(g: int, views: int, device: torch.device) -> None:
    scene = cloud(g, views, 20, 20, terms=1)
    found = rendered(scene, 20, 20, device, torch.float32, backend="native")
    assert torch.equal(found["colors"].cpu(), scene["backgrounds"][:, None, None].expand(views, 20, 20, 3))


@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "sh"])
def test_numbers_that_are_not_finite_are_named(name: str, device: torch.device) -> None:
    scene = {key: tensor.to(device) for key, tensor in cloud(20, 1, 20, 20, terms=4).items()}
    scene[name].view(-1)[7] = math.nan
    with pytest.raises(ValueError, match=f"^{name}"):
        rasterize(**scene, width=20, height=20, backend="native")


@pytest.mark.parametrize(
    "g, size, views, terms, scale",
    [(50_000, 512, 2, 16, 0.006), (300_000, 512, 1, 1, 0.002), (2_000, 1100, 1, 4, 0.2)],
)
def test_large_scenes(g: int, size: int, views: int, terms: int, scale: float, device: torch.device) -> None:
    if device.type == "cpu":
        g, size = g // 50, size // 8
    scene = cloud(g, views, size, size, terms=terms, scale=scale)
    options = {"backend": "native", "antialiased": True, "eps2d": 0.1}
    found = rendered(scene, size, size, device, torch.float32, **options)
    check_same(found, rendered(scene, size, size, device, torch.float32, **options))
    check_close(found, rendered(scene, size, size, "cpu", torch.float32, **options), 5e-3)


@pytest.mark.parametrize("g, terms, antialiased", [(50_000, 16, False), (200_000, 1, True)])
def test_gsplat_draws_the_same(g: int, terms: int, antialiased: bool, gpu: torch.device) -> None:
    pytest.importorskip("gsplat")
    scene = cloud(g, 1, 512, 512, terms=terms, scale=0.004)
    ours, theirs = (
        rendered(scene, 512, 512, gpu, torch.float32, backend=backend, antialiased=antialiased)
        for backend in ("native", "gsplat")
    )
    assert relative_error(ours["colors"], theirs["colors"]) <= 1e-3
    check_close(ours, theirs, 2e-2)


def test_another_stream(gpu: torch.device) -> None:
    """Kernels run on the current stream, behind what is queued there."""
    scene = cloud(20_000, 1, 256, 256, terms=1, scale=0.01)
    first = rendered(scene, 256, 256, gpu, torch.float32, backend="native")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        second = rendered(scene, 256, 256, gpu, torch.float32, backend="native")
    stream.synchronize()
    check_same(first, second)


def test_blending_weights(device: torch.device) -> None:
    scene = cloud(30, 2, 20, 17, terms=1)
    geometry = {k: scene[k] for k in ("means", "quats", "scales", "opacities", "viewmats", "Ks")}
    masks = torch.rand(2, 17, 20, 3, generator=torch.Generator().manual_seed(1))
    found = blending_weights(
        **{k: t.to(device) for k, t in geometry.items()}, masks=masks.to(device), backend="native"
    )
    exact = blending_weights(
        **{k: t.double() for k, t in geometry.items()}, masks=masks.double(), backend="reference"
    )
    assert relative_error(found, exact) < 1e-3
