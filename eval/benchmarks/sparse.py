"""Sparse convolution and patchify: 20,000 voxels of a bumpy shell in a 64³ grid, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diff2to3.errors import MissingDependencyError
from diff2to3.kernels.neighbors import NeighborPlan, neighbor_plan
from diff2to3.kernels.patchify import PatchPlan, patch_plan, patchify
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv
from diff2to3.nn.spconv_backend import require_spconv, submanifold_conv_spconv

from .common import Config, Function, Row, copy_bandwidth, interleaved_medians, matmul_rate

RESOLUTION, NUM_VOXELS = 64, 20_000

#: What the project set itself: milliseconds on one thread of the machine it was planned on.
BARS = {
    "neighbor map 27": 5.0,
    "submanifold 64->64 forward": 56.0,
    "submanifold 64->64 backward": 106.0,
    "submanifold 8->128 forward": 17.0,
    "submanifold 8->128 backward": 35.0,
    "patch map": 1.0,
    "patchify 8->128 forward": 1.6,
    "patchify 8->128 backward": 2.1,
}


def bumpy_shell(device: torch.device) -> Tensor:
    """The cells nearest to a sphere with bumps: int32 [20000, 4], about 19.5 neighbours a voxel."""
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION - 0.5
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = (x * x + y * y + z * z).sqrt()
    bumps = torch.sin(5 * torch.atan2(y, x)) * torch.sin(4 * torch.acos((z / radius).clamp(-1, 1)))
    distance = (radius - 0.36 - 0.04 * bumps).abs()
    nearest = distance.flatten().argsort()[:NUM_VOXELS].sort().values
    cells = torch.stack(torch.unravel_index(nearest, distance.shape), 1)
    return F.pad(cells, (1, 0)).to(torch.int32).to(device)


def run(config: Config) -> list[Row]:
    coords = bumpy_shell(config.device)
    neighbors, patches = neighbor_plan(coords), patch_plan(coords)
    rows = [*map_rows(coords, neighbors, patches, config)]
    for cin, cout in ((64, 64), (8, 128)):
        rows += submanifold_rows(neighbors, cin, cout, config)
    rows += cross_rows(coords, 64, 64, config)
    rows += patch_rows(coords, patches, 8, 128, config)
    rows += pooling_rows(patches, 128, config)
    return rows


# ---- rows ----


def map_rows(coords: Tensor, neighbors: NeighborPlan, patches: PatchPlan, config: Config) -> list[Row]:
    """Plans, from coordinates; with rows in random order they must be sorted first."""
    shuffled = coords[
        torch.randperm(len(coords), generator=torch.Generator().manual_seed(0)).to(coords.device)
    ]
    rows = []
    for name, table, plan, torch_way in (
        ("neighbor map 27", neighbors.table, neighbor_plan, torch_neighbors),
        ("patch map", patches.children, patch_plan, torch_patches),
    ):
        peers: dict[str, Function] = {"torch": functools.partial(torch_way, coords)}
        notes = add_spconv(peers, lambda n=name: spconv_map(coords, n), config, backward=False)
        ours = {"ours": functools.partial(plan, coords), "ours, shuffled": functools.partial(plan, shuffled)}
        ms = interleaved_medians(ours | peers, config)
        moved = coords.numel() * 4 + table.numel() * 4
        limit = 1e3 * moved / copy_bandwidth(config)
        rows.append(row(name, ms, limit, "bytes moved", notes, config))
    return rows


def submanifold_rows(plan: NeighborPlan, cin: int, cout: int, config: Config) -> list[Row]:
    pairs = torch_pairs(plan)
    conv = functools.partial(submanifold_conv, plan=plan)
    contenders: dict[str, Callable[..., Tensor]] = {
        "ours": conv,
        "torch": lambda f, w, b: torch_conv(f, w, b, pairs, plan.num_voxels),
    }
    name = f"submanifold {cin}->{cout}"
    return conv_rows(name, contenders, plan.num_voxels, (cout, 3, 3, 3, cin), int((plan.table >= 0).sum()),
                     lambda f, w: spconv_submanifold(plan, f, w), config)  # fmt: skip


def cross_rows(coords: Tensor, cin: int, cout: int, config: Config) -> list[Row]:
    """The kernel of a voxel and its 6 face neighbours, which no peer has."""
    plan = neighbor_plan(coords, "cross")
    pairs = torch_pairs(plan)
    contenders: dict[str, Callable[..., Tensor]] = {
        "ours": functools.partial(submanifold_conv, plan=plan),
        "torch": lambda f, w, b: torch_conv(f, w, b, pairs, plan.num_voxels),
    }
    num_pairs = int((plan.table >= 0).sum())
    return conv_rows(
        f"cross {cin}->{cout}", contenders, plan.num_voxels, (cout, 7, cin), num_pairs, None, config
    )


def patch_rows(coords: Tensor, plan: PatchPlan, cin: int, cout: int, config: Config) -> list[Row]:
    pairs = [(rows[rows >= 0].long(), torch.nonzero(rows >= 0)[:, 0]) for rows in plan.children]
    contenders: dict[str, Callable[..., Tensor]] = {
        "ours": functools.partial(patch_conv, plan=plan),
        "torch": lambda f, w, b: torch_conv(f, w, b, pairs, plan.num_patches),
    }
    return conv_rows(f"patchify {cin}->{cout}", contenders, plan.num_voxels, (cout, 2, 2, 2, cin),
                     plan.num_voxels, lambda f, w: spconv_strided(coords, f, w), config)  # fmt: skip


def conv_rows(
    name: str,
    contenders: dict[str, Callable[..., Tensor]],
    num_rows: int,
    shape: tuple[int, ...],
    num_pairs: int,
    make_spconv: Callable[[Tensor, Tensor], Function] | None,
    config: Config,
) -> list[Row]:
    """Forward and backward; the backward of each contender runs on a graph made outside the clock."""
    generator, place = torch.Generator().manual_seed(0), (config.device, dtype_on(config.device))
    feats = torch.randn(num_rows, shape[-1], generator=generator).to(*place).requires_grad_()
    weight = torch.randn(shape, generator=generator).mul(0.05).to(*place).requires_grad_()
    bias = torch.randn(shape[0], generator=generator).to(*place).requires_grad_()
    graphs = {who: conv(feats, weight, bias) for who, conv in contenders.items()}
    v_out = torch.randn(graphs["ours"].shape, generator=generator).to(*place)

    def backward(who: str) -> Function:
        return lambda: torch.autograd.grad(graphs[who], (feats, weight, bias), v_out, retain_graph=True)

    forward: dict[str, Function] = {
        who: functools.partial(without_grad, conv, feats, weight, bias) for who, conv in contenders.items()
    }
    back = {who: backward(who) for who in contenders}
    notes: dict[str, tuple[str, ...]] = {"forward": (), "backward": ()}
    if make_spconv is not None:
        notes["forward"] = add_spconv(
            forward, lambda: make_spconv(feats.detach(), weight.detach()), config, False
        )
        notes["backward"] = add_spconv(back, lambda: spconv_backward(make_spconv(feats, weight), feats, weight, v_out),
                                       config, True)  # fmt: skip
    operations = 2 * num_pairs * shape[0] * shape[-1]
    moved = feats.element_size() * (feats.numel() + weight.numel() + v_out.numel())
    rows = []
    for kind, functions, factor in (("forward", forward, 1), ("backward", back, 2)):
        by_work = 1e3 * factor * operations / matmul_rate(config, feats.dtype)
        by_bytes = 1e3 * factor * moved / copy_bandwidth(config)
        limit = "multiplications" if by_work > by_bytes else "bytes moved"
        ms = interleaved_medians(functions, config)
        rows.append(row(f"{name} {kind}", ms, max(by_work, by_bytes), limit, notes[kind], config))
    return rows


def dtype_on(device: torch.device) -> torch.dtype:
    """What convolutions are timed in: float16 on a GPU, where networks run in half precision and spconv has it."""
    return torch.float16 if device.type == "cuda" else torch.float32


def pooling_rows(plan: PatchPlan, channels: int, config: Config) -> list[Row]:
    """The mean over the voxels of a patch."""
    feats = torch.randn(plan.num_voxels, channels, generator=torch.Generator().manual_seed(0))
    feats = feats.to(config.device).requires_grad_()
    index = plan.parents.long()

    def with_torch() -> Tensor:
        sums = feats.new_zeros(plan.num_patches, channels).index_add(0, index, feats)
        return sums / plan.counts[:, None]

    makers: dict[str, Callable[[], Tensor]] = {"ours": lambda: patchify(feats, plan), "torch": with_torch}
    graphs = {who: make() for who, make in makers.items()}
    v_out = torch.randn_like(graphs["ours"])

    def backward(who: str) -> Function:
        return lambda: torch.autograd.grad(graphs[who], feats, v_out, retain_graph=True)

    limit = 1e3 * 4 * (feats.numel() + v_out.numel()) / copy_bandwidth(config)
    rows = []
    for kind, functions in (("forward", dict(makers)), ("backward", {who: backward(who) for who in makers})):
        ms = interleaved_medians(functions, config)
        rows.append(row(f"patch mean {channels} {kind}", ms, limit, "bytes moved", (), config))
    return rows


def row(
    name: str, ms: dict[str, float], limit_ms: float, limit: str, notes: tuple[str, ...], config: Config
) -> Row:
    peers = {who: time for who, time in ms.items() if who != "ours"}
    bar = BARS.get(name) if config.device.type == "cpu" and config.threads == 1 else None
    return Row(name, ms["ours"], peers, limit_ms, limit, notes, bar)


@torch.no_grad()
def without_grad(conv: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return conv(*args)


# ---- plain torch ----


def torch_neighbors(coords: Tensor) -> Tensor:
    """A dense grid of rows, read at 27 shifted places."""
    size = RESOLUTION + 2
    x, y, z = (coords[:, 1:].long() + 1).unbind(1)
    rows = torch.full((size**3,), -1, dtype=torch.int32, device=coords.device)
    cells = (x * size + y) * size + z
    rows[cells] = torch.arange(len(coords), dtype=torch.int32, device=coords.device)
    steps = torch.arange(-1, 2, device=coords.device)
    shifts = ((steps[:, None, None] * size + steps[:, None]) * size + steps).flatten()
    return rows[cells + shifts[:, None]]


def torch_patches(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted codes and where each voxel's is, as TRELLIS does it."""
    b, x, y, z = (coords.long() // torch.tensor([1, 2, 2, 2], device=coords.device)).unbind(1)
    codes, parents = torch.unique(((b * 32 + x) * 32 + y) * 32 + z, return_inverse=True)
    return codes, parents


def torch_pairs(plan: NeighborPlan) -> list[tuple[Tensor, Tensor]]:
    return [(rows[rows >= 0].long(), torch.nonzero(rows >= 0)[:, 0]) for rows in plan.table]


def torch_conv(
    feats: Tensor, weight: Tensor, bias: Tensor, pairs: list[tuple[Tensor, Tensor]], num_out: int
) -> Tensor:
    """One gather, product and scatter-add per tap, differentiated by autograd."""
    taps = weight.flatten(1, -2).unbind(1)
    out = bias.expand(num_out, -1).contiguous()
    for matrix, (inputs, outputs) in zip(taps, pairs, strict=True):
        out = out.index_add(0, outputs, feats.index_select(0, inputs) @ matrix.t())
    return out


# ---- spconv ----


def add_spconv(
    functions: dict[str, Function], make: Callable[[], Function], config: Config, backward: bool
) -> tuple[str, ...]:
    """Adds spconv to the contenders, or returns the line that says why it does not run."""
    try:
        require_spconv()
    except MissingDependencyError as error:
        return (f"spconv: not installed: {str(error).split('add it with: ')[-1]}",)
    if config.device.type == "cpu" and backward:
        return ("spconv: no backward pass on a CPU",)
    if config.device.type == "cpu" and config.threads > 1:
        return ("spconv: not reliable on a CPU with more than one thread",)
    functions["spconv"] = make()
    return ()


def spconv_indices(coords: Tensor, submanifold: bool):  # type: ignore[no-untyped-def]
    """Output voxels, pairs of rows and their numbers, by spconv's Native algorithm."""
    from spconv.pytorch import ops

    spconv = require_spconv()
    size, stride, padding = (3, 1, 1) if submanifold else (2, 2, 0)
    triples = ([n] * 3 for n in (size, stride, padding, 1, 0))
    shape = [RESOLUTION] * 3
    return ops.get_indice_pairs(coords, 1, shape, spconv.ConvAlgo.Native, *triples, submanifold)


def spconv_map(coords: Tensor, name: str) -> Function:
    return lambda: spconv_indices(coords, name.startswith("neighbor"))


def spconv_submanifold(plan: NeighborPlan, feats: Tensor, weight: Tensor) -> Function:
    """On a GPU by its implicit matrix product, the fastest that it has; on a CPU by its only algorithm."""
    if feats.is_cuda:
        return lambda: submanifold_conv_spconv(feats, weight, None, plan)
    from spconv.pytorch import functional

    coords = plan.coords
    algorithm = require_spconv().ConvAlgo.Native
    _, pairs, counts = spconv_indices(coords, True)
    return lambda: functional.indice_subm_conv(feats, weight, pairs, counts, len(feats), algorithm)


def spconv_strided(coords: Tensor, feats: Tensor, weight: Tensor) -> Function:
    from spconv.pytorch import functional

    algorithm = require_spconv().ConvAlgo.Native
    outputs, pairs, counts = spconv_indices(coords, False)
    return lambda: functional.indice_conv(feats, weight, pairs, counts, len(outputs), algorithm)


def spconv_backward(forward: Function, feats: Tensor, weight: Tensor, v_out: Tensor) -> Function:
    out = forward()
    return lambda: torch.autograd.grad(out, (feats, weight), v_out, retain_graph=True)
