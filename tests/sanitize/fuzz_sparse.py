"""Random and hostile voxel sets for the sparse core: plans, convolutions, pooling, forward and backward."""

from __future__ import annotations

import torch
from draw import EXTREMES, NOT_FINITE, chance, choice, integer, normal, spoil
from torch import Tensor

from diff2to3.kernels.neighbors import MAX_BATCH, MAX_COORD, neighbor_plan
from diff2to3.kernels.patchify import REDUCTIONS, patch_plan, patchify, unpatchify
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv, unpatch_conv

KERNELS = (1, 3, 3, 3, 5, "cross")
CHANNELS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 70, 130)


def draw_coords(generator: torch.Generator) -> Tensor:
    """Distinct voxels: none, one, a dense block, a cloud, the corners of the range; in order or not."""
    side = choice(generator, (1, 2, 3, 8, 20, MAX_COORD))
    start = choice(generator, (0, 1, 255, MAX_COORD - side))
    count = choice(generator, (0, 1, 2, 50, 400, 5000))
    xyz = torch.randint(side, (count, 3), generator=generator) + min(start, MAX_COORD - side)
    batch = torch.randint(choice(generator, (1, 2, MAX_BATCH)), (count, 1), generator=generator)
    coords = torch.unique(torch.cat([batch, xyz], 1), dim=0).to(torch.int32)
    return coords[torch.randperm(len(coords), generator=generator)] if chance(generator, 0.5) else coords


def spoil_coords(generator: torch.Generator, coords: Tensor) -> Tensor:
    """Entries outside the range, or rows that repeat others."""
    coords = coords.clone().long()
    if len(coords) == 0:
        return coords.int()
    for _ in range(integer(generator, 1, 3)):
        row, other = (integer(generator, 0, len(coords) - 1) for _ in range(2))
        if chance(generator, 0.5):
            coords[row] = coords[other]
        else:
            value = choice(generator, (-1, -(2**31), 2**31 - 1, MAX_COORD, 65536, 2**40, -(2**62)))
            coords[row, integer(generator, 0, 3)] = int(value)
    return coords if chance(generator, 0.5) else coords.clamp(-(2**31), 2**31 - 1).int()


def draw_feats(generator: torch.Generator, rows: int, channels: int) -> Tensor:
    dtype = choice(generator, (torch.float32, torch.float32, torch.float64, torch.bfloat16))
    values = choice(generator, (EXTREMES, NOT_FINITE))
    share = choice(generator, (0.0, 0.0, 0.1))
    return spoil(generator, normal(generator, rows, channels), values, share).to(dtype)


def backward(generator: torch.Generator, out: Tensor, leaves: list[Tensor]) -> None:
    torch.autograd.grad(out, leaves, normal(generator, *out.shape).to(out.dtype))


def sparse_plans(generator: torch.Generator) -> str:
    coords = draw_coords(generator)
    spoiled = chance(generator, 0.5)
    if spoiled:
        coords = spoil_coords(generator, coords)
    try:
        neighbor_plan(coords, choice(generator, KERNELS), backend="native")
        patch_plan(coords, integer(generator, 1, 5), backend="native")
    except ValueError as error:
        assert spoiled and str(error).startswith("coords: "), error
        return "refused"
    return "planned"


def sparse_convolutions(generator: torch.Generator) -> str:
    coords = draw_coords(generator)
    cin, cout = (int(choice(generator, CHANNELS)) for _ in range(2))
    name = str(choice(generator, ("submanifold", "patch", "unpatch")))
    if name == "submanifold":
        kernel = choice(generator, KERNELS)
        plan = neighbor_plan(coords, kernel, backend="native")
        function, rows, taps = submanifold_conv, len(coords), (plan.num_taps,)
    else:
        size = integer(generator, 1, 4)
        plan = patch_plan(coords, size, backend="native")
        function = patch_conv if name == "patch" else unpatch_conv
        rows, taps = (len(coords) if name == "patch" else plan.num_patches), (size,) * 3
    feats = draw_feats(generator, rows, cin).requires_grad_()
    weight = normal(generator, cout, *taps, cin).to(feats.dtype).requires_grad_()
    leaves = [feats, weight]
    if chance(generator, 0.5):
        leaves.append(normal(generator, cout).to(feats.dtype).requires_grad_())
    out = function(*leaves[:2], leaves[2] if len(leaves) > 2 else None, plan, backend="native")
    backward(generator, out, leaves)
    return name


def sparse_pooling(generator: torch.Generator) -> str:
    coords = draw_coords(generator)
    plan = patch_plan(coords, integer(generator, 1, 4), backend="native")
    channels = int(choice(generator, CHANNELS))
    feats = draw_feats(generator, len(coords), channels).requires_grad_()
    pooled = patchify(feats, plan, str(choice(generator, REDUCTIONS)), backend="native")
    backward(generator, unpatchify(pooled, plan, backend="native"), [feats])
    return "pooled"


CASES = [sparse_plans, sparse_convolutions, sparse_pooling]
