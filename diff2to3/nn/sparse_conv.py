"""Sparse convolution layers. A plan, built once for a set of voxels, is handed to every layer on them.

plan = neighbor_plan(voxels.coords)
feats = conv2(act(conv1(voxels.feats, plan)), plan)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diff2to3.kernels.library import BACKENDS
from diff2to3.kernels.neighbors import NeighborPlan, kernel_offsets, neighbor_plan
from diff2to3.kernels.patchify import PatchPlan
from diff2to3.kernels.sparse_conv import patch_conv, submanifold_conv, unpatch_conv

from .spconv_backend import require_spconv, submanifold_conv_spconv

__all__ = ["NeighborPlan", "PatchConv3d", "SubmanifoldConv3d", "UnpatchConv3d", "neighbor_plan"]


class SubmanifoldConv3d(nn.Module):
    """Submanifold convolution: the outputs are the input's voxels. [N, in_channels] -> [N, out_channels].

    Parameters have spconv's layout: ``weight`` [out, k, k, k, in] ([out, 7, in] for the ``cross`` kernel),
    ``bias`` [out].

    Args:
        kernel: an odd size, or ``cross``: the voxel and its 6 face neighbours.
        backend: ``auto``, ``native`` or ``reference`` (the project's own), or ``spconv``, which on a CPU only
            does forward passes on one thread.

    Raises:
        ValueError: an unknown kernel or backend.
        MissingDependencyError: spconv is asked for and not installed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | str = 3,
        bias: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_taps = len(kernel_offsets(kernel))
        shape = (kernel,) * 3 if isinstance(kernel, int) else (self.num_taps,)
        check_backend(backend, kernel)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel, self.backend = kernel, backend
        self.weight = nn.Parameter(torch.empty(out_channels, *shape, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        reset_parameters(self.weight, self.bias)

    def forward(self, feats: Tensor, plan: NeighborPlan) -> Tensor:
        """``plan`` is the neighbor plan of the voxels that ``feats`` belong to, with this layer's kernel."""
        if self.backend == "spconv":
            return submanifold_conv_spconv(feats, self.weight, self.bias, plan)
        return submanifold_conv(feats, self.weight, self.bias, plan, backend=self.backend)

    def extra_repr(self) -> str:
        channels = f"{self.in_channels}, {self.out_channels}"
        return f"{channels}, kernel={self.kernel!r}, bias={self.bias is not None}"


class PatchConv3d(nn.Module):
    """Weighted patchify, a convolution of size and stride ``patch_size``: [N, in] -> [M, out channels]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int = 2,
        bias: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend, None)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch_size, self.backend = patch_size, backend
        self.weight = nn.Parameter(torch.empty(out_channels, *(patch_size,) * 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        reset_parameters(self.weight, self.bias)

    def forward(self, feats: Tensor, plan: PatchPlan) -> Tensor:
        """``plan`` is the patch plan of the voxels that ``feats`` belong to."""
        return patch_conv(feats, self.weight, self.bias, plan, backend=self.backend)

    def extra_repr(self) -> str:
        channels = f"{self.in_channels}, {self.out_channels}"
        return f"{channels}, patch_size={self.patch_size}, bias={self.bias is not None}"


class UnpatchConv3d(PatchConv3d):
    """Weighted unpatchify, the transposed convolution: [M, in] -> [N, out channels]."""

    def forward(self, feats: Tensor, plan: PatchPlan) -> Tensor:
        """``plan`` is the patch plan of the voxels to return to."""
        return unpatch_conv(feats, self.weight, self.bias, plan, backend=self.backend)


def check_backend(backend: str, kernel: int | str | None) -> None:
    """ValueError for a backend that the layer does not have; ``kernel`` is None where spconv is no choice."""
    choices = BACKENDS if kernel is None else (*BACKENDS, "spconv")
    if backend not in choices:
        raise ValueError(f"backend: expected one of {', '.join(choices)}, got {backend!r}")
    if backend == "spconv":
        if kernel in ("cross", 1):  # at size 1, spconv takes the weight for one of [in, out]
            raise ValueError(f"backend: 'spconv' has no kernel {kernel!r} like ours; use backend='auto'")
        require_spconv()


def reset_parameters(weight: Tensor, bias: Tensor | None) -> None:
    """torch's default for convolutions: uniform within ±1/√fan_in."""
    bound = 1 / math.sqrt(max(weight[0].numel(), 1))
    with torch.no_grad():
        weight.uniform_(-bound, bound)
        if bias is not None:
            bias.uniform_(-bound, bound)
