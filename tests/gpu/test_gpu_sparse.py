"""Sparse plans, convolutions and pooling on a GPU against the reference in float64; in a graph and compiled."""

from __future__ import annotations

import pytest
import torch

from diff2to3.kernels.neighbors import neighbor_plan
from diff2to3.kernels.patchify import REDUCTIONS, patch_plan, patchify, unpatchify
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv, unpatch_conv

from gpu_scenes import relative_error, shell  # isort: skip

pytestmark = pytest.mark.cuda

SHELLS = {
    "none": (0, 8, 1),
    "one": (1, 8, 1),
    "tiny": (300, 16, 1),
    "some": (1500, 24, 3),
    "many": (60_000, 96, 4),
}


@pytest.mark.parametrize("name", SHELLS)
def test_plans(name: str, device: torch.device) -> None:
    coords = shell(*SHELLS[name])
    for kernel in (3, 5, "cross"):
        found, wanted = (
            neighbor_plan(coords.to(device), kernel),
            neighbor_plan(coords, kernel, backend="reference"),
        )
        assert torch.equal(found.table.cpu(), wanted.table), kernel
    for size in (2, 3):
        patches, reference = (
            patch_plan(coords.to(device), size),
            patch_plan(coords, size, backend="reference"),
        )
        for part in ("coords", "children", "parents", "slots", "counts"):
            assert torch.equal(getattr(patches, part).cpu(), getattr(reference, part)), (size, part)


@pytest.mark.parametrize("make", [neighbor_plan, patch_plan])
def test_bad_coordinates(make, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    good = shell(300, 16)
    with pytest.raises(ValueError, match="repeats"):
        make(torch.cat([good, good[7:8]]).to(device))
    with pytest.raises(ValueError, match="row 5"):
        make(good.index_fill(0, torch.tensor([5]), -1).to(device))


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cin, cout", [(8, 12), (3, 5), (64, 64), (2048, 128), (128, 1024)])
def test_convolutions(cin: int, cout: int, dtype: torch.dtype, device: torch.device) -> None:
    """Results and gradients, in chunks of a small workspace; widths are those of SMDiT's pyramid too."""
    coords = shell(300 if cin * cout > 5000 else 1500, 24, 2)
    neighbors, patches = neighbor_plan(coords, backend="reference"), patch_plan(coords, backend="reference")
    for function, rows, taps, plan in (
        (submanifold_conv, len(coords), 3, neighbors),
        (patch_conv, len(coords), 2, patches),
        (unpatch_conv, patches.num_patches, 2, patches),
    ):
        rng = torch.Generator().manual_seed(1)
        feats = torch.randn(rows, cin, generator=rng).to(dtype)
        weight = (torch.randn(cout, taps, taps, taps, cin, generator=rng) / (cin * taps**3) ** 0.5).to(dtype)
        bias = torch.randn(cout, generator=rng).to(dtype)
        results = []
        for place, kind, backend in (
            (device, dtype, "native"),
            (torch.device("cpu"), torch.float64, "reference"),
        ):
            leaves = [t.to(place, kind).requires_grad_() for t in (feats, weight, bias)]
            out = function(*leaves, plan.to(place), workspace=4 << 20, backend=backend)  # type: ignore[operator]
            v_out = torch.rand(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(out)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, v_out)])
        errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
        assert max(errors) < TOLERANCES[dtype], (function.__name__, errors)


@pytest.mark.parametrize("channels", [128, 5])
def test_sums_and_copies(channels: int, device: torch.device) -> None:
    coords = shell(1500, 24, 2)
    plan = patch_plan(coords, backend="reference")
    rows = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(0))
    for reduction in REDUCTIONS:
        found = patchify(rows.to(device), plan.to(device), reduction)
        assert relative_error(found, patchify(rows.double(), plan, reduction, backend="reference")) < 1e-6
    few = torch.randn(plan.num_patches, channels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatchify(few.to(device), plan.to(device)).cpu(), few[plan.parents.long()])


def convolution(gpu: torch.device) -> tuple[torch.Tensor, torch.Tensor, object]:
    coords = shell(1500, 24).to(gpu)
    feats = torch.randn(len(coords), 8, device=gpu, requires_grad=True)
    return feats, torch.randn(16, 3, 3, 3, 8, device=gpu), neighbor_plan(coords)


def test_compiled(gpu: torch.device) -> None:
    feats, weight, plan = convolution(gpu)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return submanifold_conv(torch.nn.functional.silu(x), weight, None, plan).square().sum()  # type: ignore[arg-type]

    compiled = torch.compile(loss, fullgraph=True)(feats)
    compiled.backward()
    torch.testing.assert_close(compiled, loss(feats), rtol=1e-3, atol=0)
    assert feats.grad is not None


def test_captured_in_a_graph(gpu: torch.device) -> None:
    feats, weight, plan = convolution(gpu)
    with torch.no_grad():
        submanifold_conv(feats, weight, None, plan)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = submanifold_conv(feats, weight, None, plan)  # type: ignore[arg-type]
        feats.normal_()
        graph.replay()
        assert torch.equal(out, submanifold_conv(feats, weight, None, plan))  # type: ignore[arg-type]
