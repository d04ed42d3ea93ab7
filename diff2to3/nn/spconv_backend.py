"""spconv as another backend of submanifold convolution, used only where it is asked for by name.

Known of spconv 2.3 on a CPU, and refused here: it has no backward pass, and its results are silently wrong
with two threads or more. It also takes no bias there, so the bias is added outside.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from diff2to3.errors import MissingDependencyError
from diff2to3.kernels.neighbors import NeighborPlan
from diff2to3.kernels.patchify import check_feats
from diff2to3.kernels.sparse_conv import check_weights


def require_spconv() -> Any:
    """The module ``spconv.pytorch``, or MissingDependencyError with the line that adds it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about how spconv uses autocast
            return importlib.import_module("spconv.pytorch")
    except ImportError as error:
        raise MissingDependencyError("spconv", "spconv") from error


def submanifold_conv_spconv(feats: Tensor, weight: Tensor, bias: Tensor | None, plan: NeighborPlan) -> Tensor:
    """What :func:`diff2to3.kernels.sparse_conv.submanifold_conv` computes, by spconv with a map of its own.

    Args as there; ``weight`` [Cout, k, k, k, Cin].

    Raises:
        ValueError: sizes that do not match the plan.
        RuntimeError: a call that spconv cannot serve on a CPU.
    """
    spconv = require_spconv()
    check_feats("feats", feats, plan.num_voxels, plan.coords.device)
    check_weights(feats, weight, bias, plan.num_taps)
    if weight.ndim != 5:
        raise ValueError(f"weight: expected [out, k, k, k, in], got {list(weight.shape)}")
    if feats.device.type == "cpu":
        refuse_on_cpu(feats, weight)
    if plan.num_voxels == 0:
        return feats.new_zeros(0, weight.shape[0])
    sizes = (plan.coords.amax(0) + 1).tolist()
    voxels = spconv.SparseConvTensor(feats, plan.coords, sizes[1:], sizes[0])
    layer = layer_without_weights(feats.shape[1], weight.shape[0], weight.shape[1], feats.device.type)
    out = torch.func.functional_call(layer, {"weight": weight}, (voxels,)).features
    return out if bias is None else out + bias


def refuse_on_cpu(feats: Tensor, weight: Tensor) -> None:
    if feats.dtype != torch.float32:
        raise RuntimeError(f"backend 'spconv' on a CPU takes float32, got {feats.dtype}; use backend='auto'")
    if torch.is_grad_enabled() and (feats.requires_grad or weight.requires_grad):
        raise RuntimeError(
            "backend 'spconv' has no backward pass on a CPU; use torch.no_grad() or backend='auto'"
        )
    if torch.get_num_threads() > 1:
        raise RuntimeError(
            "backend 'spconv' is silently wrong on a CPU with more than one thread; "
            "call torch.set_num_threads(1) or use backend='auto'"
        )


@functools.cache
def layer_without_weights(
    in_channels: int, out_channels: int, kernel: int, device_type: str
) -> torch.nn.Module:
    """An spconv layer whose own weights are never used."""
    spconv = require_spconv()
    algorithm = spconv.ConvAlgo.Native if device_type == "cpu" else None  # the default algorithm needs CUDA
    with torch.random.fork_rng(devices=[]):
        return spconv.SubMConv3d(in_channels, out_channels, kernel, bias=False, algo=algorithm)
