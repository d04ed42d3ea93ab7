"""Neighbour maps of submanifold convolution: which voxel meets which at every tap of the kernel.

    plan = neighbor_plan(coords, kernel=3)      once for a set of voxels
    submanifold_conv(feats, weight, bias, plan) in every layer (sparse_conv.py)

Coordinates become sorted 64-bit keys, in which a tap is a constant to add, so that all neighbours are found
by merging the keys with themselves. Plain PyTorch version: :func:`neighbor_table_reference`. C++:
csrc/cpu/sparse_maps.cpp, CUDA: csrc/cuda/sparse_maps.cu, and csrc/sparse_keys.h, which both share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .library import call, define_op, resolve_backend, target

#: Limits of a key (csrc/sparse_keys.h): values of a spatial field, margin on both of its ends, batch indices.
KEY_FIELD, KEY_MARGIN, MAX_BATCH = 1 << 16, 8, 1 << 15
MAX_COORD = KEY_FIELD - 2 * KEY_MARGIN
MAX_VOXELS = 2**31 - 1


@dataclass(frozen=True)
class NeighborPlan:
    """The neighbours of N voxels at the K taps of a kernel; built once and handed to every layer.

    coords   int32 [N, 4]  (batch, x, y, z), in the order of the feature rows
    table    int32 [K, N]  row of the voxel at coords[n] + offsets[k], or -1 where none is active
    offsets  K times (dx, dy, dz) in the order of the weight's taps: x slowest, z fastest. Tap K - 1 - k is
             the opposite of tap k, so reading the table backwards gives the transposed convolution
    """

    coords: Tensor
    table: Tensor
    offsets: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device | str) -> NeighborPlan:
        """The same plan on ``device``."""
        return replace(self, coords=self.coords.to(device), table=self.table.to(device))

    @property
    def num_taps(self) -> int:
        return int(self.table.shape[0])

    @property
    def num_voxels(self) -> int:
        return int(self.table.shape[1])


def neighbor_plan(coords: Tensor, kernel: int | str = 3, *, backend: str = "auto") -> NeighborPlan:
    """Find every voxel's neighbours.

    Args:
        coords: int32 or int64 [N, 4] (batch, x, y, z) in any order; N may be 0. Batch indices must be below
            32,768 and x, y, z below 65,520.
        kernel: an odd size from 1 to 15 (3 gives the 27 taps of a 3³ kernel), or ``cross`` for the voxel and
            its 6 face neighbours.
        backend: ``auto``, ``native`` or ``reference`` (library.py).

    Raises:
        ValueError: wrong shape or dtype, a coordinate outside those limits, or a voxel that occurs twice.
    """
    coords = check_coords(coords)
    offsets = kernel_offsets(kernel)
    flat = [step for offset in offsets for step in offset]
    chosen = resolve_backend(backend, coords.device, torch.float32)
    return NeighborPlan(coords, neighbor_table(coords, flat, chosen), offsets)


def kernel_offsets(kernel: int | str) -> tuple[tuple[int, int, int], ...]:
    """The taps of a kernel as (dx, dy, dz), x slowest."""
    if kernel == "cross":
        return tuple(o for o in kernel_offsets(3) if sum(map(abs, o)) <= 1)
    if not isinstance(kernel, int) or kernel % 2 == 0 or not 1 <= kernel <= 2 * KEY_MARGIN - 1:
        largest = 2 * KEY_MARGIN - 1
        raise ValueError(f"kernel: expected an odd size from 1 to {largest} or 'cross', got {kernel!r}")
    steps = range(-(kernel // 2), kernel // 2 + 1)
    return tuple((dx, dy, dz) for dx in steps for dy in steps for dz in steps)


# ---- checks ----


def check_coords(coords: Tensor) -> Tensor:
    """``coords`` as contiguous int32 [N, 4]. ValueError for anything that cannot be that."""
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords: expected shape [N, 4] (batch, x, y, z), got {list(coords.shape)}")
    if coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"coords: expected int32 or int64, got {coords.dtype}")
    if len(coords) > MAX_VOXELS:
        raise ValueError(f"coords: at most {MAX_VOXELS} voxels, got {len(coords)}")
    if coords.dtype == torch.int64 and len(coords):
        limits = torch.iinfo(torch.int32)
        coords = coords.clamp(limits.min, limits.max)  # what is outside stays outside, and is reported below
    return coords.to(torch.int32).contiguous()


def new_status(coords: Tensor) -> Tensor:
    """Where kernels report bad rows: the first outside the limits, and the first that repeats another."""
    return torch.full((2,), len(coords), dtype=torch.int64, device=coords.device)


def raise_bad(coords: Tensor, status: Tensor) -> None:
    """ValueError if ``status`` names a bad row."""
    outside, repeated = status.tolist()
    if outside < len(coords):
        raise ValueError(
            f"coords: row {outside} is {coords[outside].tolist()}; "
            f"the batch index must be in [0, {MAX_BATCH}) and x, y, z in [0, {MAX_COORD})"
        )
    if repeated < len(coords):
        voxel = coords[repeated].tolist()
        raise ValueError(f"coords: row {repeated} repeats voxel {voxel}; every voxel may occur once")


# ---- keys ----


def sorted_keys(coords: Tensor, patch_size: int, status: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Keys of the patches that hold the voxels, ascending: int64 [N], and the rows they are of: int32 [N]."""
    if backend == "reference":
        keys = voxel_keys_reference(coords, patch_size, status)
    else:
        keys = torch.empty(len(coords), dtype=torch.int64, device=coords.device)
        call("voxel_keys", coords, keys, status, len(coords), patch_size, device=coords.device)
    if backend == "native" and target(coords.device) == "cpu":
        order = torch.empty(len(coords), dtype=torch.int32)
        call("sort_keys", keys, order, len(coords), device=coords.device)
        return keys, order
    keys, long_order = torch.sort(keys, stable=True)
    return keys, long_order.to(torch.int32)


def voxel_keys_reference(coords: Tensor, patch_size: int, status: Tensor) -> Tensor:
    batch, xyz = coords[:, 0].long(), coords[:, 1:].long()
    fits = (batch >= 0) & (batch < MAX_BATCH) & ((xyz >= 0) & (xyz < MAX_COORD)).all(1)
    rows = torch.arange(len(coords), device=coords.device)
    status[0] = torch.cat([rows[~fits], status[:1]]).min()
    x, y, z = (xyz // patch_size + KEY_MARGIN).unbind(1)
    keys = ((batch * KEY_FIELD + x) * KEY_FIELD + y) * KEY_FIELD + z
    return torch.where(fits, keys, 0)


# ---- the op ----


@define_op("neighbor_table", "(Tensor coords, int[] offsets, str backend) -> Tensor")
def neighbor_table(coords: Tensor, offsets: Sequence[int], backend: str) -> Tensor:
    """Rows of the neighbours, -1 for none: int32 [K, N]. ``offsets``: K times (dx, dy, dz), sorted."""
    status = new_status(coords)
    keys, order = sorted_keys(coords, 1, status, backend)
    if backend == "reference":
        table = neighbor_table_reference(keys, order, offsets, status)
    else:
        table = torch.empty((len(offsets) // 3, len(coords)), dtype=torch.int32, device=coords.device)
        steps = torch.tensor(offsets, dtype=torch.int32).to(coords.device)
        call(
            "neighbor_table", keys, order, steps, table, status, len(coords), len(table), device=coords.device
        )
    raise_bad(coords, status)
    return table


@torch.library.register_fake("diff2to3::neighbor_table")
def _(coords: Tensor, offsets: Sequence[int], backend: str) -> Tensor:
    return coords.new_empty((len(offsets) // 3, coords.shape[0]), dtype=torch.int32)


def neighbor_table_reference(keys: Tensor, order: Tensor, offsets: Sequence[int], status: Tensor) -> Tensor:
    """The op in plain PyTorch: one binary search per voxel and tap."""
    num_taps, num_voxels = len(offsets) // 3, len(keys)
    table = torch.full((num_taps, num_voxels), -1, dtype=torch.int32, device=keys.device)
    if num_voxels == 0:
        return table
    again = keys[1:] == keys[:-1]
    status[1] = torch.cat([torch.maximum(order[1:], order[:-1])[again].long(), status[1:]]).min()
    for k in range(num_taps):
        dx, dy, dz = offsets[3 * k : 3 * k + 3]
        wanted = keys + (dx * KEY_FIELD + dy) * KEY_FIELD + dz
        found = torch.searchsorted(keys, wanted).clamp(max=num_voxels - 1)
        table[k, order.long()] = torch.where(keys[found] == wanted, order[found], -1)
    return table
