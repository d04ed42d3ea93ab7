"""The CUDA sources of the sparse core, run by the emulator: plans, columns, sums and copies, in several orders."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diff2to3.kernels import build, sparse_products
from diff2to3.kernels.neighbors import neighbor_plan
from diff2to3.kernels.patchify import REDUCTIONS, patch_plan, patchify, unpatchify
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv, unpatch_conv

HERE = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(build.shutil.which, ("c++", "g++", "clang++"))),
    reason="the emulator needs Linux and a C++ compiler",
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The sparse CUDA kernels serve tensors in ordinary memory."""
    spec = importlib.util.spec_from_file_location("emulator", HERE / "cuda_emulator" / "emulator.py")
    assert spec and spec.loader
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    names = ("sparse_maps.cu", "sparse_gather.cu", "launch.cu")
    sources = [build.SOURCES / "cuda" / name for name in names]
    file = emulator.compile_emulated(tmp_path_factory.mktemp("sparse"), sources)
    with pytest.MonkeyPatch.context() as patch:
        emulator.install(file, patch)
        yield emulator


@pytest.fixture(params=[0, 7], autouse=True)
def order(emulated: ModuleType, request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs threads in ascending order, and in a random one."""
    emulated.call("emulator_seed", request.param)
    yield request.param
    emulated.call("emulator_seed", 0)


@pytest.fixture(params=[0, 1, 150])
def coords(request: pytest.FixtureRequest, generator: torch.Generator) -> Tensor:
    """Voxels of two grids in random order."""
    cells = torch.nonzero(torch.rand(2, 9, 9, 9, generator=generator) < 0.4).int()
    return cells[torch.randperm(len(cells), generator=generator)[: request.param]]


def test_plans(coords: Tensor) -> None:
    for kernel in (3, 5, "cross"):
        ours, reference = (neighbor_plan(coords, kernel, backend=b) for b in ("native", "reference"))
        assert torch.equal(ours.table, reference.table)
    for size in (2, 3):
        ours, reference = (patch_plan(coords, size, backend=b) for b in ("native", "reference"))
        for name in ("coords", "children", "parents", "slots", "counts"):
            assert torch.equal(getattr(ours, name), getattr(reference, name)), name


def test_bad_coordinates(generator: torch.Generator) -> None:
    good = torch.nonzero(torch.rand(1, 8, 8, 8, generator=generator) < 0.5).int()
    for make_plan in (neighbor_plan, patch_plan):
        for row, column in ((5, 0), (100, 3)):
            bad = good.clone()
            bad[row, column] = -1
            bad[row + 20, 1] = 1 << 20
            with pytest.raises(ValueError, match=f"^coords: row {row} is"):
                make_plan(bad, backend="native")
        with pytest.raises(ValueError, match=f"^coords: row {len(good)} repeats"):
            make_plan(torch.cat([good, good[7:8]]), backend="native")


@pytest.mark.parametrize("dtype, channels", [(torch.float32, 8), (torch.float32, 5), (torch.float64, 3)])
def test_sums_and_copies(
    coords: Tensor, dtype: torch.dtype, channels: int, generator: torch.Generator
) -> None:
    plan = patch_plan(coords, backend="reference")
    rows = torch.randn(len(coords), channels, generator=generator, dtype=dtype)
    for reduce in REDUCTIONS:
        compare(lambda f, b, r=reduce: patchify(f, plan, r, backend=b), [rows])
    rows = torch.randn(plan.num_patches, channels, generator=generator, dtype=dtype)
    compare(lambda f, b: unpatchify(f, plan, backend=b), [rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cin, cout", [(8, 12), (3, 5), (6, 2)])
def test_convolutions(
    coords: Tensor, dtype: torch.dtype, cin: int, cout: int, generator: torch.Generator
) -> None:
    """Rows of 32, 12, 24, 16, 6 and more bytes: every width of copy. Two or more chunks."""
    plan, patch = neighbor_plan(coords, backend="reference"), patch_plan(coords, backend="reference")
    for function, rows, taps, given in (
        (submanifold_conv, len(coords), 3, plan),
        (patch_conv, len(coords), 2, patch),
        (unpatch_conv, patch.num_patches, 2, patch),
    ):
        shapes = ((rows, cin), (cout, taps, taps, taps, cin), (cout,))
        leaves = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        compare(lambda *a, f=function, p=given: f(*a[:3], p, workspace=20_000, backend=a[3]), leaves)


@pytest.mark.parametrize("workspace", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_come_first_where_the_output_is_narrower(
    coords: Tensor,
    dtype: torch.dtype,
    workspace: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tap at a time, some, or all; forward and weight gradient gather rows of the output's width alone."""
    widths: list[int] = []
    copy = sparse_products.copy_columns

    def watched(direction: str, source: Tensor, *rest: Any) -> None:
        widths.append(source.shape[1])
        copy(direction, source, *rest)

    monkeypatch.setattr(sparse_products, "copy_columns", watched)
    plan = neighbor_plan(coords, backend="reference")
    leaves = [
        torch.randn(s, generator=generator).to(dtype) for s in ((len(coords), 12), (6, 3, 3, 3, 12), (6,))
    ]
    compare(lambda *a: submanifold_conv(*a[:3], plan, workspace=workspace, backend=a[3]), leaves)
    assert len(coords) == 0 or set(widths) == {6}


def test_unaligned_rows(generator: torch.Generator) -> None:
    """A view that starts within a row of 16 bytes is copied in smaller units."""
    coords = torch.nonzero(torch.rand(1, 6, 6, 6, generator=generator) < 0.5).int()
    plan = neighbor_plan(coords, backend="reference")
    feats = torch.randn(4 * len(coords) + 1, generator=generator)[1:].view(-1, 4)
    weight = torch.randn(2, 3, 3, 3, 4, generator=generator)
    compare(lambda f, w, b: submanifold_conv(f, w, None, plan, backend=b), [feats, weight])


def compare(function, leaves: list[Tensor]) -> None:  # type: ignore[no-untyped-def]
    """Results and gradients of the emulated kernels against the reference."""
    results = []
    for backend in ("native", "reference"):
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*inputs, backend)
        v_out = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, inputs, v_out)))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[leaves[0].dtype]
    for ours, reference in zip(*results, strict=True):
        scale = float(reference.detach().abs().max()) if reference.numel() else 1.0
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * max(scale, 1e-6))
