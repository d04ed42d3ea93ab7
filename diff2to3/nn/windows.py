"""3D (shifted) windows over sparse voxels, as a frozen plan that all blocks of a network share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diff2to3.nn.sequences import SequencePlan

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class WindowPlan:
    """Voxels grouped by batch item and by floor((coord + shift) / window) on each axis.

    window, shift  per axis, in voxels
    sequences      one sequence a non-empty window, in lexicographic order of (batch, window)
    """

    window: Triple
    shift: Triple
    sequences: SequencePlan

    @staticmethod
    def build(coords: Tensor, window: int | Triple, shift: int | Triple = 0) -> WindowPlan:
        """From coords int32 [N, 4] (batch, x, y, z), in any order.

        Waits once for the device, to learn the lengths.
        """
        if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"coords: expected int32 or int64 [N, 4], got {coords.dtype} {list(coords.shape)}"
            )
        window, shift = triple(window, "window"), triple(shift, "shift")
        if min(window) < 1:
            raise ValueError(f"window: expected positive sizes, got {window}")
        keys = window_keys(coords, window, shift)
        order = torch.argsort(keys, stable=True)
        _, counts = torch.unique_consecutive(keys[order], return_counts=True)
        sequences = SequencePlan.from_lengths(counts.tolist(), order=order)
        return WindowPlan(window, shift, sequences)


def triple(value: int | Triple, name: str) -> Triple:
    """One number for all axes, or three."""
    sizes = (value, value, value) if isinstance(value, int) else tuple(int(n) for n in value)
    if len(sizes) != 3:
        raise ValueError(f"{name}: expected one number or three, got {value}")
    return sizes[0], sizes[1], sizes[2]


def window_keys(coords: Tensor, window: Triple, shift: Triple) -> Tensor:
    """One int64 a voxel, equal for voxels of one window and increasing with (batch, window).

    ValueError on overflow.
    """
    device = coords.device
    cells = coords.long()
    xyz = torch.div(
        cells[:, 1:] + torch.tensor(shift, device=device),
        torch.tensor(window, device=device),
        rounding_mode="floor",
    )
    columns = torch.cat([cells[:, :1], xyz], 1)
    if not len(columns):
        return columns[:, 0]
    low = columns.amin(0)
    extents = (columns.amax(0) - low + 1).tolist()
    if extents[0] * extents[1] * extents[2] * extents[3] >= 1 << 63:
        raise ValueError(f"coords: {extents} batch items and windows do not fit 64-bit keys")
    keys = columns[:, 0] - low[0]
    for axis in (1, 2, 3):
        keys = keys * extents[axis] + (columns[:, axis] - low[axis])
    return keys
