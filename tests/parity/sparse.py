"""Compare sparse convolution and patchify with dense convolutions in float64, forward and backward.

    python tests/parity/sparse.py [--voxels 1500] [--resolution 24] [--threads 1,2] [--seed 0]

Every function runs on a bumpy shell with shuffled rows, with the compiled kernel on each number of threads
and with the PyTorch reference. The oracle is torch's conv3d, conv_transpose3d or avg_pool3d on the dense grid in
float64; the error may be at most twice that of the same dense function in float32, plus 1e-6 of the largest
value. Results must be the same bit for bit on every number of threads. Then torch's opcheck and gradcheck run
on every op. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.kernels import neighbors, patchify, sparse_conv
from diff2to3.kernels.neighbors import kernel_offsets, neighbor_plan
from diff2to3.kernels.patchify import PatchPlan, patch_plan
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv, unpatch_conv

FLOOR = 1e-6
BACKENDS = ("native", "reference")
CHANNELS = ((8, 8), (8, 128), (128, 8), (64, 64), (5, 7), (1, 3), (70, 33))


class Problem(NamedTuple):
    """One function to check. Both callables take (feats, weight, bias); ``sparse`` also takes the backend."""

    name: str
    feats: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sparse: Callable[..., Tensor]
    dense: Callable[..., Tensor]


def bumpy_shell(resolution: int, num_voxels: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """The cells nearest to a bumpy sphere in each grid of a batch, in random order: int32 [N, 4]."""
    axis = (torch.arange(resolution) + 0.5) / resolution - 0.5
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = (x * x + y * y + z * z).sqrt()
    items = []
    for b in range(batch_size):
        bumps = torch.sin((7 + b) * x) * torch.sin(9 * y) * torch.sin(11 * z)
        distance = (radius - 0.36 - 0.1 * bumps).abs()
        nearest = distance.flatten().argsort()[: num_voxels // batch_size]
        cells = torch.stack(torch.unravel_index(nearest, distance.shape), 1)
        items.append(F.pad(cells, (1, 0), value=b))
    coords = torch.cat(items).to(torch.int32)
    return coords[torch.randperm(len(coords), generator=generator)]


# ---- dense counterparts, in any dtype ----


def to_grid(feats: Tensor, coords: Tensor, resolution: int) -> Tensor:
    """[N, C] -> [B, C, R, R, R], zero where no voxel is."""
    b, x, y, z = coords.long().unbind(1)
    grid = feats.new_zeros(int(b.max()) + 1, resolution, resolution, resolution, feats.shape[1])
    return grid.index_put((b, x, y, z), feats).permute(0, 4, 1, 2, 3)


def from_grid(grid: Tensor, coords: Tensor) -> Tensor:
    """[B, C, R, R, R] -> [N, C]."""
    b, x, y, z = coords.long().unbind(1)
    return grid.permute(0, 2, 3, 4, 1)[b, x, y, z]


def submanifold_problem(
    coords: Tensor, resolution: int, kernel: int | str, cin: int, cout: int, generator: torch.Generator
) -> Problem:
    plans = {backend: neighbor_plan(coords, kernel, backend=backend) for backend in BACKENDS}
    assert torch.equal(plans["native"].table, plans["reference"].table), "neighbor tables differ"
    side = kernel if isinstance(kernel, int) else 3
    taps = kernel_offsets(kernel)
    shape = (kernel,) * 3 if isinstance(kernel, int) else (len(taps),)

    def dense(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        cube = weight.new_zeros(side, side, side, cout, cin)
        where = (torch.tensor(taps) + side // 2).unbind(1)
        cube = cube.index_put(where, weight.reshape(cout, -1, cin).transpose(0, 1))
        grid = to_grid(feats, coords, resolution)
        return from_grid(F.conv3d(grid, cube.permute(3, 4, 0, 1, 2), bias, padding=side // 2), coords)

    def sparse(feats: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return submanifold_conv(feats, weight, bias, plans[backend].to(feats.device), backend=backend)

    feats, weight, bias = draw(len(coords), (cout, *shape, cin), generator)
    return Problem(f"submanifold {kernel} {cin}->{cout}", feats, weight, bias, sparse, dense)


def patch_problem(
    coords: Tensor, resolution: int, size: int, cin: int, cout: int, generator: torch.Generator
) -> Problem:
    plans = patch_plans(coords, size)

    def dense(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grid = to_grid(feats, coords, resolution)
        out = F.conv3d(grid, weight.permute(0, 4, 1, 2, 3), bias, stride=size)
        return from_grid(out, plans["native"].coords)

    def sparse(feats: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return patch_conv(feats, weight, bias, plans[backend].to(feats.device), backend=backend)

    feats, weight, bias = draw(len(coords), (cout, size, size, size, cin), generator)
    return Problem(f"patch conv {size} {cin}->{cout}", feats, weight, bias, sparse, dense)


def unpatch_problem(
    coords: Tensor, resolution: int, size: int, cin: int, cout: int, generator: torch.Generator
) -> Problem:
    plans = patch_plans(coords, size)

    def dense(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grid = to_grid(feats, plans["native"].coords, resolution // size)
        out = F.conv_transpose3d(grid, weight.permute(4, 0, 1, 2, 3), bias, stride=size)
        return from_grid(out, coords)

    def sparse(feats: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return unpatch_conv(feats, weight, bias, plans[backend].to(feats.device), backend=backend)

    feats, weight, bias = draw(plans["native"].num_patches, (cout, size, size, size, cin), generator)
    return Problem(f"unpatch conv {size} {cin}->{cout}", feats, weight, bias, sparse, dense)


def pool_problem(
    coords: Tensor, resolution: int, size: int, reduce: str, channels: int, generator: torch.Generator
) -> Problem:
    plans = patch_plans(coords, size)

    def dense(feats: Tensor, *_: None) -> Tensor:
        def sums(rows: Tensor) -> Tensor:
            mean = F.avg_pool3d(to_grid(rows, coords, resolution), size)
            return from_grid(mean, plans["native"].coords) * size**3

        counts = sums(torch.ones_like(feats[:, :1])).round()
        divisor = {"sum": torch.ones_like(counts), "mean": counts, "mean_with_zero": counts + 1}[reduce]
        return sums(feats) / divisor

    def sparse(feats: Tensor, _weight: None, _bias: None, backend: str) -> Tensor:
        return patchify.patchify(feats, plans[backend].to(feats.device), reduce, backend=backend)

    feats = torch.randn(len(coords), channels, generator=generator)
    return Problem(f"patchify {size} {reduce} {channels}", feats, None, None, sparse, dense)


def copy_problem(
    coords: Tensor, resolution: int, size: int, channels: int, generator: torch.Generator
) -> Problem:
    plans = patch_plans(coords, size)

    def dense(feats: Tensor, *_: None) -> Tensor:
        grid = to_grid(feats, plans["native"].coords, resolution // size)
        return from_grid(F.interpolate(grid, scale_factor=size, mode="nearest"), coords)

    def sparse(feats: Tensor, _weight: None, _bias: None, backend: str) -> Tensor:
        return patchify.unpatchify(feats, plans[backend].to(feats.device), backend=backend)

    feats = torch.randn(plans["native"].num_patches, channels, generator=generator)
    return Problem(f"unpatchify {size} {channels}", feats, None, None, sparse, dense)


def patch_plans(coords: Tensor, size: int) -> dict[str, PatchPlan]:
    plans = {backend: patch_plan(coords, size, backend=backend) for backend in BACKENDS}
    for name in ("coords", "children", "parents", "slots", "counts"):
        values = [getattr(plan, name) for plan in plans.values()]
        assert torch.equal(*values), f"patch plans differ in {name}"
    return plans


def draw(rows: int, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features, a weight that keeps their scale, and a bias."""
    feats = torch.randn(rows, shape[-1], generator=generator)
    fan_in = torch.Size(shape[1:]).numel()
    weight = torch.randn(shape, generator=generator) / fan_in**0.5
    return feats, weight, torch.randn(shape[0], generator=generator)


# ---- comparison ----


def evaluate(
    function: Callable[..., Tensor], leaves: list[Tensor | None], v_out: Tensor | None
) -> list[Tensor]:
    """The result and the gradients of Σ v_out · result; ``v_out`` None gives the result alone."""
    used = [leaf for leaf in leaves if leaf is not None]
    out = function(*leaves)
    if v_out is None:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, used, v_out.to(out.dtype))]


def oracle(problem: Problem, generator: torch.Generator) -> tuple[Tensor, list[Tensor], list[float]]:
    """v_out, the exact results, and how far the dense function in float32 is from them."""

    def leaves(dtype: torch.dtype) -> list[Tensor | None]:
        given = (problem.feats, problem.weight, problem.bias)
        return [None if t is None else t.to(dtype).requires_grad_() for t in given]

    shape = evaluate(problem.dense, leaves(torch.float32), None)[0].shape
    v_out = torch.randn(shape, generator=generator)
    exact = evaluate(problem.dense, leaves(torch.float64), v_out)
    rounded = evaluate(problem.dense, leaves(torch.float32), v_out)
    return v_out, exact, [relative_error(a, b) for a, b in zip(rounded, exact, strict=True)]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours.double() - exact).abs().max() / exact.abs().max())


def compare(
    problem: Problem, threads: list[int], generator: torch.Generator, device: str = "cpu"
) -> Iterator[tuple[str, bool]]:
    """Lines of the table, with whether each is good."""
    v_out, exact, floors = oracle(problem, generator)
    names = ["out", "v_feats", "v_weight", "v_bias"][: len(exact)]
    first: list[Tensor] | None = None
    for backend, count in [("native", n) for n in threads] + [("reference", threads[0])]:
        torch.set_num_threads(count)
        leaves = [
            None if t is None else t.to(device, copy=True).requires_grad_()
            for t in (problem.feats, problem.weight, problem.bias)
        ]
        found = evaluate(lambda *a, b=backend: problem.sparse(*a, b), leaves, v_out.to(device))
        found = [tensor.cpu() for tensor in found]
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        good = all(e <= 2 * floor + FLOOR for e, floor in zip(errors, floors, strict=True))
        text = "  ".join(f"{name} {error:.1e}" for name, error in zip(names, errors, strict=True))
        if backend == "native":
            same = first is None or all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
            first, good = first or found, good and same
            text += "" if same else "  DIFFERS FROM ONE THREAD"
        yield f"{problem.name:26} {backend:9} {count} thread{'s' if count > 1 else ' '}  {text}", good


def op_checks(generator: torch.Generator) -> Iterator[tuple[str, bool]]:
    """opcheck and gradcheck of every op, on both backends."""
    coords = bumpy_shell(8, 60, 2, generator)
    neighbor, patch = neighbor_plan(coords), patch_plan(coords)
    flat = [step for offset in neighbor.offsets for step in offset]
    tables = (patch.children, patch.parents, patch.slots)
    n, m = neighbor.num_voxels, patch.num_patches

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    for backend in BACKENDS:
        scale = torch.rand(m, generator=generator, dtype=torch.float64)
        calls = [
            (neighbors.neighbor_table, (coords, flat, backend), 0),
            (patchify.patch_tables, (coords, 2, backend), 0),
            (patchify.patch_sum, (random(n, 3), *tables[:2], scale, backend), 1),
            (patchify.patch_copy, (random(m, 3), *tables[:2], scale, backend), 1),
        ]
        for kind, rows, outs, taps, given in (
            ("submanifold", n, n, 27, (neighbor.table, None, None)),
            ("patch", n, m, 8, tables),
            ("unpatch", m, n, 8, tables),
        ):
            feats, weight, bias = random(rows, 3), random(4, taps, 3), random(4)
            settings = (kind, 1 << 20, backend)
            calls.append((sparse_conv.sparse_conv, (feats, weight, bias, *given, *settings), 3))
            inputs = [random(outs, 4).detach(), feats.detach(), weight.detach(), *given]
            for needed in ([True, True, True], [False, True, False]):
                calls.append((sparse_conv.sparse_conv_backward, (*inputs, needed, *settings), 0))
        for op, args, num_inputs in calls:
            overload = getattr(torch.ops.diff2to3, op.__name__).default
            name = f"{op.__name__:24} {backend:9}"
            yield check(f"opcheck   {name}", lambda op=overload, args=args: torch.library.opcheck(op, args))
            if num_inputs:

                def of_inputs(*inputs: Tensor, op=op, args=args) -> Tensor:  # type: ignore[no-untyped-def]
                    return op(*inputs, *args[len(inputs) :])

                yield check(
                    f"gradcheck {name}",
                    lambda f=of_inputs, x=args[:num_inputs]: torch.autograd.gradcheck(f, x, fast_mode=True),
                )


def check(line: str, run: Callable[[], object]) -> tuple[str, bool]:
    try:
        run()
    except Exception as error:
        return f"{line} {type(error).__name__}: {str(error).splitlines()[0]}", False
    return line, True


def problems(args: argparse.Namespace, generator: torch.Generator) -> Iterator[Problem]:
    coords = bumpy_shell(args.resolution, args.voxels, 2, generator)
    for cin, cout in CHANNELS:
        yield submanifold_problem(coords, args.resolution, 3, cin, cout, generator)
    for kernel in (1, 5, "cross"):
        yield submanifold_problem(coords, args.resolution, kernel, 8, 16, generator)
    for size, cin, cout in ((2, 8, 128), (2, 128, 8), (2, 5, 7), (3, 4, 20), (4, 8, 32)):
        grid = args.resolution // size * size + (size if args.resolution % size else 0)
        yield patch_problem(coords, grid, size, cin, cout, generator)
        yield unpatch_problem(coords, grid, size, cin, cout, generator)
    grid = args.resolution + args.resolution % 2
    for reduce in patchify.REDUCTIONS:
        yield pool_problem(coords, grid, 2, reduce, 37, generator)
    yield copy_problem(coords, grid, 2, 37, generator)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voxels", type=int, default=1500, help="in a batch of two grids")
    parser.add_argument("--resolution", type=int, default=24, help="of the grids")
    parser.add_argument("--threads", default="1,2", help="comma-separated numbers of threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # of gradcheck, about integer tables
    generator = torch.Generator().manual_seed(args.seed)
    threads = [int(count) for count in args.threads.split(",")]
    num_lines = failures = 0

    def report(line: str, good: bool) -> None:
        nonlocal num_lines, failures
        num_lines, failures = num_lines + 1, failures + (not good)
        print(f"{line}  {'ok' if good else 'FAILED'}", flush=True)

    for problem in problems(args, generator):
        for line, good in compare(problem, threads, generator, args.device):
            report(line, good)
    for line, good in op_checks(generator):
        report(line, good)
    print(f"{num_lines} checks, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
