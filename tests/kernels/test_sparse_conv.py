"""Sparse convolution and patchify against dense convolutions in float64, on every instruction set of this machine."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diff2to3.kernels import library, sparse_products
from diff2to3.kernels.neighbors import neighbor_plan
from diff2to3.kernels.patchify import PatchPlan, patch_plan, patchify, unpatchify
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv, unpatch_conv, workspace_of


def load_parity() -> ModuleType:
    """The parity program, whose dense counterparts are the oracle here too."""
    spec = importlib.util.spec_from_file_location(
        "parity_sparse", Path(__file__).parents[1] / "parity" / "sparse.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


parity = load_parity()


def variants() -> list[str]:
    file = library.cpu_library_file()
    return library.runnable_variants(file.parent) if file else []


@pytest.fixture(params=variants())
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the kernels of one instruction set."""
    file = library.cpu_library_file()
    assert file is not None
    chosen = library.load_cpu(file.parent, request.param)
    monkeypatch.setattr(library, "cpu_library", lambda: chosen)
    return str(request.param)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(problem) -> None:  # type: ignore[no-untyped-def]
    """All lines of the parity table: error within twice the dense function's own, same on one and two threads."""
    lines = list(parity.compare(problem, [1, 2], torch.Generator().manual_seed(1)))
    assert all(good for _, good in lines), "\n".join(line for line, _ in lines)


@pytest.mark.parametrize(
    "cin, cout", [(1, 1), (8, 8), (3, 17), (8, 128), (128, 8), (64, 64), (65, 130), (200, 40)]
)
def test_submanifold_conv(variant: str, cin: int, cout: int, generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(12, 700, 2, generator)
    check(parity.submanifold_problem(coords, 12, 3, cin, cout, generator))


@pytest.mark.parametrize("kernel", [1, 5, "cross"])
def test_other_kernels(variant: str, kernel: int | str, generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(10, 300, 2, generator)
    check(parity.submanifold_problem(coords, 10, kernel, 6, 20, generator))


@pytest.mark.parametrize("size, cin, cout", [(2, 8, 128), (2, 128, 8), (2, 9, 30), (3, 4, 5), (4, 2, 70)])
def test_patch_convs(variant: str, size: int, cin: int, cout: int, generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(12, 500, 2, generator)
    check(parity.patch_problem(coords, 12, size, cin, cout, generator))
    check(parity.unpatch_problem(coords, 12, size, cin, cout, generator))


@pytest.mark.parametrize("reduce", ["mean", "sum", "mean_with_zero"])
@pytest.mark.parametrize("size", [2, 3])
def test_pooling(variant: str, size: int, reduce: str, generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(12, 500, 2, generator)
    check(parity.pool_problem(coords, 12, size, reduce, 19, generator))
    check(parity.copy_problem(coords, 12, size, 19, generator))


def test_ops_pass_opcheck_and_gradcheck(generator: torch.Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of gradcheck, about integer tables
        results = list(parity.op_checks(generator))
    assert len(results) >= 36
    assert all(good for _, good in results), "\n".join(line for line, good in results if not good)


@given(
    sizes=st.tuples(
        st.integers(1, 80), st.integers(1, 20), st.integers(1, 70), st.sampled_from([1, 3, "cross"])
    ),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=20, deadline=None)
def test_random_sizes_match_the_reference(sizes: tuple, seed: int) -> None:  # type: ignore[type-arg]
    num_voxels, cin, cout, kernel = sizes
    generator = torch.Generator().manual_seed(seed)
    coords = parity.bumpy_shell(6, num_voxels, 1, generator)
    plan, patch = neighbor_plan(coords, kernel), patch_plan(coords)
    taps = (kernel,) * 3 if isinstance(kernel, int) else (7,)
    calls: list[tuple[Callable[..., Tensor], int, tuple[int, ...], object]] = [
        (submanifold_conv, len(coords), taps, plan),
        (patch_conv, len(coords), (2, 2, 2), patch),
        (unpatch_conv, patch.num_patches, (2, 2, 2), patch),
    ]
    for function, rows, kernel_shape, given_plan in calls:
        feats = torch.randn(rows, cin, generator=generator, dtype=torch.float64).requires_grad_()
        weight = torch.randn(
            cout, *kernel_shape, cin, generator=generator, dtype=torch.float64
        ).requires_grad_()
        results = []
        for backend in ("native", "reference"):
            out = function(feats, weight, None, given_plan, backend=backend)
            v_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
            results.append((out, *torch.autograd.grad(out, (feats, weight), v_out)))
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Sums are formed in float32: the result is within half a unit of the exact one for the rounded inputs."""
    coords = parity.bumpy_shell(12, 600, 1, generator)
    plan, patch = neighbor_plan(coords), patch_plan(coords)
    feats = torch.randn(len(coords), 24, generator=generator).to(dtype)
    weight = (torch.randn(16, 3, 3, 3, 24, generator=generator) / 25).to(dtype)
    out = submanifold_conv(feats.requires_grad_(), weight.requires_grad_(), None, plan)
    exact = submanifold_conv(feats.double(), weight.double(), None, plan)
    assert out.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert bool(((out - exact).abs() <= 1.01 * unit * exact.abs() + 1e-5).all())
    for grad in torch.autograd.grad(out.sum(), (feats, weight)):
        assert grad.dtype == dtype
    for pooled in (patchify(feats, patch), unpatchify(patchify(feats, patch), patch)):
        assert pooled.dtype == dtype


def test_autocast(generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(10, 200, 1, generator)
    plan = neighbor_plan(coords)
    feats = torch.randn(len(coords), 6, generator=generator)
    weight = torch.randn(4, 3, 3, 3, 6, generator=generator).requires_grad_()
    bias = torch.randn(4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        out = submanifold_conv(feats, weight, bias, plan)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), weight)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), submanifold_conv(feats, weight, bias, plan), rtol=0.05, atol=0.1)


def test_shapes_without_data(generator: torch.Generator) -> None:
    """A dry run on the meta device."""
    coords = parity.bumpy_shell(10, 200, 1, generator)
    plan, patch = neighbor_plan(coords).to("meta"), patch_plan(coords).to("meta")
    feats = torch.zeros(len(coords), 6, device="meta", requires_grad=True)
    out = submanifold_conv(feats, torch.zeros(4, 3, 3, 3, 6, device="meta"), None, plan)
    patchify(out, patch).sum().backward()
    assert out.shape == (len(coords), 4) and feats.grad is not None and feats.grad.shape == feats.shape


def test_only_needed_gradients(generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(10, 200, 1, generator)
    plan = neighbor_plan(coords)
    feats = torch.randn(len(coords), 6, generator=generator)
    weight = torch.randn(4, 3, 3, 3, 6, generator=generator).requires_grad_()
    out = submanifold_conv(feats, weight, None, plan)
    out.sum().backward()
    assert feats.grad is None and weight.grad is not None


def test_no_voxels() -> None:
    coords = torch.zeros(0, 4, dtype=torch.int32)
    plan, patch = neighbor_plan(coords), patch_plan(coords)
    for function, taps, given_plan in (
        (submanifold_conv, 3, plan),
        (patch_conv, 2, patch),
        (unpatch_conv, 2, patch),
    ):
        for backend in ("native", "reference"):
            feats = torch.zeros(0, 5, requires_grad=True)
            weight = torch.ones(7, taps, taps, taps, 5, requires_grad=True)
            bias = torch.ones(7, requires_grad=True)
            out = function(feats, weight, bias, given_plan, backend=backend)  # type: ignore[operator]
            assert out.shape == (0, 7)
            out.sum().backward()
            assert weight.grad is not None and not weight.grad.any() and not bias.grad.any()
    assert patchify(torch.zeros(0, 5), patch).shape == unpatchify(torch.zeros(0, 5), patch).shape == (0, 5)


def test_compiles_without_graph_breaks(generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(10, 200, 1, generator)
    plan, patch = neighbor_plan(coords), patch_plan(coords)
    weight = torch.randn(4, 3, 3, 3, 6, generator=generator)

    def network(feats: Tensor) -> Tensor:
        return patchify(submanifold_conv(feats, weight, None, plan), patch).relu()

    feats = torch.randn(len(coords), 6, generator=generator)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(feats), network(feats))


def test_pooling_with_zero_is_what_scatter_reduce_does(generator: torch.Generator) -> None:
    """TRELLIS pools with torch.scatter_reduce onto zeros, which count as one more row."""
    coords = parity.bumpy_shell(10, 200, 2, generator)
    plan = patch_plan(coords)
    feats = torch.randn(len(coords), 5, generator=generator)
    index = plan.parents.long()[:, None].expand(-1, 5)
    theirs = torch.scatter_reduce(torch.zeros(plan.num_patches, 5), 0, index, feats, "mean")
    torch.testing.assert_close(patchify(feats, plan, "mean_with_zero"), theirs)
    assert (patchify(feats, plan, "mean") - theirs).abs().max() > 0.1


# ---- the GPU's way of computing, checked on the CPU: columns and chunks ----


@pytest.fixture
def columns_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CUDA branches of the ops, with their two copy kernels replaced by indexing."""

    def copy(direction: str, source: Tensor, table: Tensor, to: Tensor, start: int, size: int) -> None:
        rows = table[:, start : start + size].t()
        if direction == "gather":
            padded = torch.cat([source, source.new_zeros(1, source.shape[1])])
            to.copy_(padded[rows.long()].reshape(size, -1))
        else:
            columns = source.view(size, len(table), -1)
            to[rows[rows >= 0].long()] = columns[rows >= 0]

    monkeypatch.setattr(sparse_products, "on_cuda_kernels", lambda feats, backend: backend == "native")
    monkeypatch.setattr(sparse_products, "copy_columns", copy)


@pytest.mark.parametrize("workspace", [1, 10_000, 1 << 30])
def test_columns_in_chunks(columns_on_cpu: None, workspace: int, generator: torch.Generator) -> None:
    coords = parity.bumpy_shell(8, 150, 1, generator)
    plan, patch = neighbor_plan(coords), patch_plan(coords)
    for function, rows, taps, given_plan in (
        (submanifold_conv, len(coords), 3, plan),
        (patch_conv, len(coords), 2, patch),
        (unpatch_conv, patch.num_patches, 2, patch),
    ):
        feats = torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_()
        weight = torch.randn(
            7, taps, taps, taps, 5, generator=generator, dtype=torch.float64
        ).requires_grad_()
        bias = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
        results = []
        for backend in ("native", "reference"):
            out = function(feats, weight, bias, given_plan, workspace=workspace, backend=backend)  # type: ignore[operator]
            v_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
            results.append((out, *torch.autograd.grad(out, (feats, weight, bias), v_out)))
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


# ---- bad input ----


@pytest.fixture
def small() -> tuple[Tensor, object, PatchPlan]:
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 3, 0, 0]], dtype=torch.int32)
    return coords, neighbor_plan(coords), patch_plan(coords)


def test_wrong_feats(small: tuple) -> None:  # type: ignore[type-arg]
    _, plan, patch = small
    weight, cube = torch.zeros(2, 3, 3, 3, 4), torch.zeros(2, 2, 2, 2, 4)
    for feats in (
        torch.zeros(2, 4),
        torch.zeros(3),
        torch.zeros(3, 4, 1),
        torch.zeros(3, 4, dtype=torch.int32),
    ):
        for call in (
            lambda f: submanifold_conv(f, weight, None, plan),
            lambda f: patch_conv(f, cube, None, patch),
            lambda f: patchify(f, patch),
        ):
            with pytest.raises(ValueError, match=r"^feats: expected"):
                call(feats)
    with pytest.raises(ValueError, match=r"^feats: on cpu, but the plan is on meta"):
        submanifold_conv(torch.zeros(3, 4), weight, None, plan.to("meta"))
    for call in (lambda f: unpatch_conv(f, cube, None, patch), lambda f: unpatchify(f, patch)):
        with pytest.raises(ValueError, match=r"^feats: expected shape \[2, channels\]"):
            call(torch.zeros(3, 4))


def test_wrong_weight_and_bias(small: tuple) -> None:  # type: ignore[type-arg]
    _, plan, _ = small
    feats, weight = torch.zeros(3, 4), torch.zeros(2, 3, 3, 3, 4)
    for wrong in (
        torch.zeros(2, 3, 3, 3, 5),
        torch.zeros(2, 2, 2, 2, 4),
        torch.zeros(2, 4),
        torch.zeros(0, 3, 3, 3, 4),
        weight.double(),
        weight.to("meta"),
    ):
        with pytest.raises(ValueError, match=r"^weight: expected"):
            submanifold_conv(feats, wrong, None, plan)
    for bias in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^bias: expected"):
            submanifold_conv(feats, weight, bias, plan)


def test_wrong_settings(small: tuple) -> None:  # type: ignore[type-arg]
    _, plan, patch = small
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        submanifold_conv(torch.zeros(3, 4), torch.zeros(2, 3, 3, 3, 4), None, plan, backend="spconv")
    with pytest.raises(ValueError, match=r"^reduce: expected one of"):
        patchify(torch.zeros(3, 4), patch, "max")


def test_workspace_follows_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 64th, within bounds; what is asked for is taken."""
    for memory, expected in ((141 << 30, 2 << 30), (24 << 30, 384 << 20), (4 << 30, 128 << 20)):
        facts = types.SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, facts=facts: facts)
        assert workspace_of(torch.device("cuda"), None) == expected
        assert workspace_of(torch.device("cuda"), 5) == 5
    assert workspace_of(torch.device("cpu"), None) == 128 << 20
