"""The rasteriser's CUDA sources, run by the emulator, against the reference in float64 and the CPU kernels."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from diff2to3.kernels import build, library
from diff2to3.kernels.rasterize import blending_weights, rasterize

HERE = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(build.shutil.which, ("c++", "g++", "clang++"))),
    reason="the emulator needs Linux and a C++ compiler",
)

SCENE = ("means", "quats", "scales", "opacities")


@pytest.fixture(scope="module")
def emulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulator", HERE / "cuda_emulator" / "emulator.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled(emulator: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [build.SOURCES / "cuda" / name for name in ("rasterize.cu", "rasterize_blend.cu", "launch.cu")]
    return emulator.compile_emulated(tmp_path_factory.mktemp("rasterize"), sources)


def make_inputs(
    g: int, views: int, width: int, height: int, *, terms: int = 0, channels: int = 0, per_view: bool = False
) -> dict[str, Tensor]:
    """A cloud of Gaussians seen from around it; SH coefficients (``terms``) or plain colours (``channels``)."""
    rng = torch.Generator().manual_seed(g + 7 * terms + channels)
    viewmats, Ks = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1), torch.zeros(views, 3, 3).double()
    for v in range(views):
        c, s = math.cos(0.4 + v), math.sin(0.4 + v)
        viewmats[v, :3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        viewmats[v, :3, 3] = torch.tensor([0.02, -0.03, 2.0])
        Ks[v] = torch.tensor([[1.5 * width, 0, 0.52 * width], [0, 1.4 * width, 0.47 * height], [0, 0, 1]])
    shape = (g, terms, 3) if terms else (views, g, channels) if per_view else (g, channels)
    inputs = {
        "means": torch.rand(g, 3, generator=rng) - 0.5,
        "quats": torch.randn(g, 4, generator=rng),
        "scales": 0.06 * torch.exp(0.5 * torch.randn(g, 3, generator=rng)),
        "opacities": 0.05 + 0.9 * torch.rand(g, generator=rng),
        "viewmats": viewmats,
        "sh" if terms else "colors": 0.4 * torch.randn(shape, generator=rng),
        "backgrounds": torch.rand(views, 3 if terms else channels, generator=rng),
        "Ks": Ks,
    }
    return {name: tensor.to(torch.float32) for name, tensor in inputs.items()}


def render_with_gradients(
    inputs: dict[str, Tensor], width: int, height: int, dtype: torch.dtype, **options: object
) -> dict[str, Tensor]:
    """Pictures, and gradients of a fixed weighted sum of them with respect to everything but ``Ks``."""
    leaves = {name: t.detach().to(dtype).requires_grad_(name != "Ks") for name, t in inputs.items()}
    out = rasterize(**leaves, width=width, height=height, **options)
    results = {"colors": out.colors, "alphas": out.alphas}
    if out.depths is not None:
        results["depths"] = out.depths
    total = torch.zeros((), dtype=dtype)
    for k, picture in enumerate(results.values()):
        weights = torch.randn(picture.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        total = total + (picture * weights.to(dtype)).sum()
    names = [name for name in leaves if name != "Ks"]
    gradients = torch.autograd.grad(total, [leaves[name] for name in names])
    results |= {f"v_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        error = (found[name].double() - reference.double()).norm() / reference.double().norm().clamp_min(
            1e-12
        )
        assert float(error) <= tolerance, f"{name}: relative error {float(error):.2e}"


CASES = {
    "degree 0": dict(g=60, views=1, terms=1),
    "degree 1, two views": dict(g=40, views=2, terms=4),
    "degree 2": dict(g=40, views=1, terms=9),
    "degree 3, antialiased": dict(g=60, views=2, terms=16, antialiased=True, eps2d=0.1),
    "one channel and depth": dict(g=40, views=1, channels=1, depth=True),
    "five channels a view": dict(g=40, views=2, channels=5, per_view=True),
    "32 channels and depth": dict(g=30, views=1, channels=32, depth=True),
    "depth and SH": dict(g=40, views=1, terms=4, depth=True),
    "many layers": dict(g=300, views=1, terms=1),
    "one Gaussian": dict(g=1, views=1, terms=1),
}


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("case", CASES)
def test_pictures_and_gradients(case: str, seed: int, emulator: ModuleType, compiled: Path) -> None:
    """Against the CPU kernel, which differs in rounding only, and the float64 reference."""
    options: dict = dict(CASES[case])
    made = {
        name: options.pop(name) for name in ("g", "views", "terms", "channels", "per_view") if name in options
    }
    width, height = 37, 21  # three tiles by two, none of them full at the right and below
    inputs = make_inputs(width=width, height=height, **made)
    exact = render_with_gradients(inputs, width, height, torch.float64, backend="reference", **options)
    on_cpu = render_with_gradients(inputs, width, height, torch.float32, backend="native", **options)
    with pytest.MonkeyPatch.context() as patch:
        emulator.install(compiled, patch)
        emulator.call("emulator_seed", seed)
        on_cuda = render_with_gradients(inputs, width, height, torch.float32, backend="native", **options)
        again = render_with_gradients(inputs, width, height, torch.float32, backend="native", **options)
    check_close(on_cuda, on_cpu, 1e-4)
    check_close(on_cuda, exact, 2e-3)
    for name, tensor in on_cuda.items():  # the order of threads changes nothing
        assert torch.equal(tensor, again[name]), name


@pytest.fixture
def on_emulator(
    emulator: ModuleType, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    emulator.install(compiled, monkeypatch)
    emulator.call("emulator_seed", 3)
    yield emulator


@pytest.mark.parametrize(("g", "views"), [(0, 1), (5, 0), (0, 0)])
def test_empty_scenes(g: int, views: int, on_emulator: ModuleType) -> None:
    inputs = make_inputs(g, views, 20, 20, terms=1)
    found = render_with_gradients(inputs, 20, 20, torch.float32, backend="native")
    assert torch.equal(found["colors"], inputs["backgrounds"][:, None, None].expand(views, 20, 20, 3))
    assert torch.equal(found["alphas"], torch.zeros(views, 20, 20))
    for name in (*SCENE, "sh", "viewmats"):
        assert torch.equal(found[f"v_{name}"], torch.zeros_like(inputs[name])), name
    reference = rasterize(**inputs, width=20, height=20, backend="reference")
    assert torch.equal(reference.colors, found["colors"])


@pytest.mark.parametrize("name", [*SCENE, "sh"])
def test_not_finite_inputs_are_named(name: str, on_emulator: ModuleType) -> None:
    inputs = make_inputs(20, 1, 20, 20, terms=4)
    inputs[name].view(-1)[7] = math.nan
    with pytest.raises(ValueError, match=f"^{name}.*NaN"):
        rasterize(**inputs, width=20, height=20, backend="native")


def test_gaussians_behind_and_around_the_camera(on_emulator: ModuleType) -> None:
    inputs = make_inputs(50, 1, 20, 20, terms=1)
    inputs["viewmats"][:, 2, 3] = 0.0
    found = render_with_gradients(inputs, 20, 20, torch.float32, backend="native")
    exact = render_with_gradients(inputs, 20, 20, torch.float64, backend="reference")
    check_close(found, exact, 2e-2)
    inputs["viewmats"] = inputs["viewmats"].detach() - 5 * torch.eye(4)[2][:, None] * torch.eye(4)[3]
    picture = rasterize(**inputs, width=20, height=20, backend="native")
    assert torch.equal(picture.colors, inputs["backgrounds"][:, None, None].expand_as(picture.colors))


def test_blending_weights(on_emulator: ModuleType) -> None:
    inputs = make_inputs(30, 2, 20, 17, terms=1)
    scene = {name: inputs[name] for name in (*SCENE, "viewmats", "Ks")}
    masks = torch.rand(2, 17, 20, 3, generator=torch.Generator().manual_seed(1))
    found = blending_weights(**scene, masks=masks, backend="native")
    expected = blending_weights(
        **{n: t.double() for n, t in scene.items()}, masks=masks.double(), backend="reference"
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_float64_has_no_cuda_kernel(on_emulator: ModuleType) -> None:
    assert library.resolve_backend("auto", torch.device("cpu"), torch.float64) == "reference"
    inputs = {name: t.double() for name, t in make_inputs(5, 1, 20, 20, terms=1).items()}
    with pytest.raises(RuntimeError, match="float64"):
        rasterize(**inputs, width=20, height=20, backend="native")
