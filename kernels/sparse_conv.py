"""Sparse convolution over plans: submanifold, strided (weighted patchify) and its transpose.

    submanifold_conv(feats, weight, bias, plan)   [N, Cin] -> [N, Cout]    plan: neighbors.NeighborPlan
    patch_conv(feats, weight, bias, plan)         [N, Cin] -> [M, Cout]    plan: patchify.PatchPlan
    unpatch_conv(feats, weight, bias, plan)       [M, Cin] -> [N, Cout]

Every one is out[o] = bias + Σ_k W_k · feats[table[k, o]]; sparse_products.py computes it. The gradient with respect
to the features is such a sum again, with the table read in the other direction, so a backward pass needs nothing
saved but its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import constant_to_compile, define_op
from .neighbors import NeighborPlan
from .patchify import PatchPlan, check_feats, choose
from .sparse_products import gather_conv, on_cuda_kernels, row_sum, slot_conv, weight_grad

#: Least and most default bound in bytes on gathered columns, and the share of a GPU's memory in between. (The CPU
#: kernels need well under 1 MiB a thread.)
LEAST_WORKSPACE, MOST_WORKSPACE, MEMORY_SHARE = 128 << 20, 2 << 30, 64


def submanifold_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: NeighborPlan,
    *,
    workspace: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Submanifold convolution: out[n] = bias + Σ_k W_k · feats at coords[n] + offsets[k], where active.

    What spconv's SubMConv3d computes, and conv3d (a cross-correlation) with zero padding at the active voxels
    of a dense grid. Differentiable in feats, weight and bias.

    Args:
        feats: [N, Cin] float32, float64, float16 or bfloat16 (half types are summed in float32).
        weight: [Cout, k, k, k, Cin], taps in the order x, y, z; [Cout, 7, Cin] for the ``cross`` kernel.
        bias: [Cout] or None.
        plan: neighbors of the same N voxels.
        workspace: bound in bytes on the rows gathered at a time on a GPU; None for a 64th of its memory.
        backend: ``auto``, ``native`` or ``reference`` (library.py).

    Raises:
        ValueError: shapes, dtypes or devices that do not match; the message names the argument.
    """
    check_feats("feats", feats, plan.num_voxels, plan.coords.device)
    feats, weight, bias = autocast(feats, weight, bias)
    flat = check_weights(feats, weight, bias, plan.num_taps)
    return sparse_conv(
        feats,
        flat,
        bias,
        plan.table,
        None,
        None,
        "submanifold",
        workspace_of(feats.device, workspace),
        choose(backend, feats),
    )


def patch_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: PatchPlan,
    *,
    workspace: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted patchify, a convolution of size and stride p: out[m] = bias + Σ over voxels W_slot · feats.

    ``feats`` [N, Cin] -> [M, Cout]; ``weight`` [Cout, p, p, p, Cin]. The rest as in :func:`submanifold_conv`.
    """
    check_feats("feats", feats, plan.num_voxels, plan.coords.device)
    feats, weight, bias = autocast(feats, weight, bias)
    flat = check_weights(feats, weight, bias, plan.num_slots)
    tables = (plan.children, plan.parents, plan.slots)
    return sparse_conv(
        feats, flat, bias, *tables, "patch", workspace_of(feats.device, workspace), choose(backend, feats)
    )


def unpatch_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: PatchPlan,
    *,
    workspace: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted unpatchify, the transposed convolution: out[n] = bias + W_slots[n] · feats[parents[n]].

    ``feats`` [M, Cin] -> [N, Cout]; ``weight`` [Cout, p, p, p, Cin]. The rest as in :func:`submanifold_conv`.
    """
    check_feats("feats", feats, plan.num_patches, plan.coords.device)
    feats, weight, bias = autocast(feats, weight, bias)
    flat = check_weights(feats, weight, bias, plan.num_slots)
    tables = (plan.children, plan.parents, plan.slots)
    return sparse_conv(
        feats, flat, bias, *tables, "unpatch", workspace_of(feats.device, workspace), choose(backend, feats)
    )


@constant_to_compile
def workspace_of(device: torch.device, asked: int | None) -> int:
    """The bound asked for, or what the device's memory allows: larger pieces make larger, faster products."""
    if asked is not None or device.type != "cuda":
        return LEAST_WORKSPACE if asked is None else asked
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(max(memory // MEMORY_SHARE, LEAST_WORKSPACE), MOST_WORKSPACE)


def autocast(feats: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in autocast's dtype where it is on, as torch's own convolutions do."""
    kind = feats.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return feats, weight, bias
    if feats.dtype == torch.float64:
        return feats, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return feats.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_weights(feats: Tensor, weight: Tensor, bias: Tensor | None, taps: int) -> Tensor:
    """``weight`` as [Cout, taps, Cin], or ValueError naming what does not fit."""
    cin = feats.shape[1]
    fits = weight.ndim in (3, 5) and weight.shape[-1] == cin and weight.shape[1:-1].numel() == taps
    if not fits or weight.shape[0] == 0 or cin == 0:
        raise ValueError(
            f"weight: expected [out, kernel taps, in] with {taps} taps and in = {cin} > 0 to match plan and "
            f"feats, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != feats.dtype or tensor.device != feats.device):
            got = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: expected {feats.dtype} on {feats.device} like feats, got {got}")
    return weight.reshape(weight.shape[0], taps, cin)


# ---- the ops ----
# `kind` is submanifold (table: the neighbor plan's), patch or unpatch (table: the patch plan's children). The
# backward pass is one op, not three: a call through torch's dispatcher costs as much as a small product.

FORWARD_SCHEMA = (
    "(Tensor feats, Tensor weight, Tensor? bias, Tensor table, Tensor? parents, Tensor? slots, "
    "str kind, int workspace, str backend) -> Tensor"
)
BACKWARD_SCHEMA = (
    "(Tensor v_out, Tensor feats, Tensor weight, Tensor table, Tensor? parents, Tensor? slots, bool[] needed, "
    "str kind, int workspace, str backend) -> (Tensor, Tensor, Tensor)"
)


@define_op("sparse_conv", FORWARD_SCHEMA)
def sparse_conv(feats, weight, bias, table, parents, slots, kind, workspace, backend):  # type: ignore[no-untyped-def]
    """feats [num_in, Cin], weight [Cout, K, Cin], bias [Cout] -> [num_out, Cout]."""
    if kind == "unpatch":
        return slot_conv(feats, weight, bias, table, parents, slots, False, workspace, backend)
    return gather_conv(feats, weight, bias, table, False, False, workspace, backend)


@define_op("sparse_conv_backward", BACKWARD_SCHEMA)
def sparse_conv_backward(  # type: ignore[no-untyped-def]
    v_out, feats, weight, table, parents, slots, needed, kind, workspace, backend
):
    """Gradients of feats, weight and bias; an empty tensor where ``needed`` says no."""
    settings = (workspace, backend)
    v_feats, v_weight, v_bias = (feats.new_empty(0) for _ in range(3))
    if needed[0] and kind == "submanifold":  # the opposite taps transpose a neighbor table
        v_feats = gather_conv(v_out, weight, None, table, True, True, *settings)
    elif needed[0] and kind == "patch":
        v_feats = slot_conv(v_out, weight, None, table, parents, slots, True, *settings)
    elif needed[0]:
        v_feats = gather_conv(v_out, weight, None, table, False, True, *settings)
    if needed[1] and kind == "unpatch":
        v_weight = weight_grad(v_out, feats, table, *settings).transpose(0, 2).contiguous()
    elif needed[1] and kind == "submanifold" and gathers_gradient(feats, v_out, backend):
        v_weight = weight_grad(v_out, feats, table, *settings).flip(1).transpose(0, 2).contiguous()
    elif needed[1]:
        v_weight = weight_grad(feats, v_out, table, *settings)
    if needed[2]:
        v_bias = row_sum(v_out, backend)
    return v_feats, v_weight, v_bias


def gathers_gradient(feats: Tensor, v_out: Tensor, backend: str) -> bool:
    """Whether a GPU gathers rows of v_out, by the opposite taps, in place of the much wider ones of feats."""
    return 2 * v_out.shape[1] <= feats.shape[1] and on_cuda_kernels(feats, backend)


@torch.library.register_fake("diff2to3::sparse_conv")
def _(feats, weight, bias, table, parents, slots, kind, workspace, backend):  # type: ignore[no-untyped-def]
    rows = parents.shape[0] if kind == "unpatch" else table.shape[1]
    return feats.new_empty(rows, weight.shape[0])


@torch.library.register_fake("diff2to3::sparse_conv_backward")
def _(v_out, feats, weight, table, parents, slots, needed, kind, workspace, backend):  # type: ignore[no-untyped-def]
    shapes = (feats.shape, weight.shape, weight.shape[:1])
    return tuple(feats.new_empty(s if need else (0,)) for s, need in zip(shapes, needed, strict=True))


def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    feats, weight, _, table, parents, slots, ctx.kind, ctx.workspace, ctx.backend = inputs
    ctx.save_for_backward(feats, weight, table, parents, slots)


def backward(ctx, v_out):  # type: ignore[no-untyped-def]
    needed = list(ctx.needs_input_grad[:3])
    grads = sparse_conv_backward(
        v_out.contiguous(), *ctx.saved_tensors, needed, ctx.kind, ctx.workspace, ctx.backend
    )
    found = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *found, None, None, None, None, None, None


torch.library.register_autograd("diff2to3::sparse_conv", backward, setup_context=setup_context)
