"""Sparse convolution over plans: submanifold, strided (weighted patchify) and its transpose.

    submanifold_conv(feats, weight, bias, plan)   [N, Cin] -> [N, Cout]    plan: neighbors.NeighborPlan
    patch_conv(feats, weight, bias, plan)         [N, Cin] -> [M, Cout]    plan: patchify.PatchPlan
    unpatch_conv(feats, weight, bias, plan)       [M, Cin] -> [N, Cout]

Every one is out[o] = bias + Σ_k W_k · feats[table[k, o]]. Three ways to compute it:

    reference       one gather, matrix product and scatter per tap
    native, CPU     csrc/cpu/sparse_conv.cpp: products over the pairs of rows that exist, read and added to
                    where they lie
    native, CUDA    the rows of a chunk of outputs gathered into columns (csrc/cuda/sparse_gather.cu), then
                    one matrix product of torch's per chunk; ``workspace`` bounds the columns

Backward passes are the same functions with the roles of input and output exchanged, and save only the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import call, target
from .neighbors import NeighborPlan
from .patchify import HALF_TYPES, PatchPlan, check_feats, choose, suffix

#: Default bound in bytes on gathered columns (CUDA only: the CPU kernels need well under 1 MiB a thread).
WORKSPACE = 128 << 20


def submanifold_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: NeighborPlan,
    *,
    workspace: int = WORKSPACE,
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
        workspace: bound in bytes on the rows gathered at a time on a GPU.
        backend: ``auto``, ``native`` or ``reference`` (library.py).

    Raises:
        ValueError: shapes, dtypes or devices that do not match; the message names the argument.
    """
    check_feats("feats", feats, plan.num_voxels, plan.coords.device)
    feats, weight, bias = autocast(feats, weight, bias)
    flat = check_weights(feats, weight, bias, plan.num_taps)
    return submanifold_conv_op(feats, flat, bias, plan.table, False, workspace, choose(backend, feats))


def patch_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: PatchPlan,
    *,
    workspace: int = WORKSPACE,
    backend: str = "auto",
) -> Tensor:
    """Weighted patchify, a convolution of size and stride p: out[m] = bias + Σ over voxels W_slot · feats.

    ``feats`` [N, Cin] -> [M, Cout]; ``weight`` [Cout, p, p, p, Cin]. The rest as in :func:`submanifold_conv`.
    """
    check_feats("feats", feats, plan.num_voxels, plan.coords.device)
    feats, weight, bias = autocast(feats, weight, bias)
    flat = check_weights(feats, weight, bias, plan.num_slots)
    tables = (plan.children, plan.parents, plan.slots)
    return patch_conv_op(feats, flat, bias, *tables, False, workspace, choose(backend, feats))


def unpatch_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: PatchPlan,
    *,
    workspace: int = WORKSPACE,
    backend: str = "auto",
) -> Tensor:
    """Weighted unpatchify, the transposed convolution: out[n] = bias + W_slots[n] · feats[parents[n]].

    ``feats`` [M, Cin] -> [N, Cout]; ``weight`` [Cout, p, p, p, Cin]. The rest as in :func:`submanifold_conv`.
    """
    check_feats("feats", feats, plan.num_patches, plan.coords.device)
    feats, weight, bias = autocast(feats, weight, bias)
    flat = check_weights(feats, weight, bias, plan.num_slots)
    tables = (plan.children, plan.parents, plan.slots)
    return unpatch_conv_op(feats, flat, bias, *tables, False, workspace, choose(backend, feats))


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
# `adjoint` computes the gradient with respect to the features: the weight is used as [in, taps, out], and the
# op's tables are read in the other direction.

CONV_SCHEMA = (
    "(Tensor feats, Tensor weight, Tensor? bias, Tensor table, "
    "bool adjoint, int workspace, str backend) -> Tensor"
)
PATCH_SCHEMA = (
    "(Tensor feats, Tensor weight, Tensor? bias, Tensor children, Tensor parents, Tensor slots, "
    "bool adjoint, int workspace, str backend) -> Tensor"
)
GRAD_SCHEMA = "(Tensor feats, Tensor v_out, Tensor table, int workspace, str backend) -> Tensor"


@torch.library.custom_op("diff2to3::submanifold_conv", mutates_args=(), schema=CONV_SCHEMA)
def submanifold_conv_op(feats, weight, bias, table, adjoint, workspace, backend):  # type: ignore[no-untyped-def]
    """feats [N, Cin], weight [Cout, K, Cin], table [K, N] -> [N, Cout]. Mirrored taps transpose the table."""
    return gather_conv(feats, weight, bias, table, adjoint, adjoint, workspace, backend)


@torch.library.custom_op("diff2to3::patch_conv", mutates_args=(), schema=PATCH_SCHEMA)
def patch_conv_op(feats, weight, bias, children, parents, slots, adjoint, workspace, backend):  # type: ignore[no-untyped-def]
    """feats [N, Cin], weight [Cout, P, Cin] -> [M, Cout]."""
    return gather_conv(feats, weight, bias, children, False, adjoint, workspace, backend)


@torch.library.custom_op("diff2to3::unpatch_conv", mutates_args=(), schema=PATCH_SCHEMA)
def unpatch_conv_op(feats, weight, bias, children, parents, slots, adjoint, workspace, backend):  # type: ignore[no-untyped-def]
    """feats [M, Cin], weight [Cout, P, Cin] -> [N, Cout]."""
    if feats.dtype in HALF_TYPES and not on_cuda_kernels(feats, backend):
        args = (children, parents, slots, adjoint, workspace, backend)
        return unpatch_conv_op(feats.float(), weight.float(), as_float(bias), *args).to(feats.dtype)
    feats, weight = feats.contiguous(), weight.contiguous()
    taps, (cin, cout) = weight.shape[1], channels_of(weight, adjoint)
    if backend == "reference":
        out = feats.new_empty(len(parents), cout)
        for k in range(taps):
            rows = torch.nonzero(slots == k)[:, 0]
            out[rows] = feats[parents[rows].long()] @ tap_matrix(weight, k, False, adjoint)
        return out if bias is None else out + bias
    out = feats.new_empty(len(parents), cout)
    if on_cuda_kernels(feats, backend):
        matrix = (weight if adjoint else weight.permute(2, 1, 0)).reshape(cin, taps * cout)
        for start, size in chunks(len(feats), taps * cout * feats.element_size(), workspace):
            columns = feats[start : start + size] @ matrix
            copy_columns("scatter", columns, children, out, start, size)
        return out if bias is None else out.add_(bias)
    call(
        f"sparse_conv_{suffix(feats)}", feats, weight, bias, parents, slots, out, len(parents), taps, cin,
        cout, False, adjoint, device=feats.device,
    )  # fmt: skip
    return out


@torch.library.custom_op("diff2to3::sparse_conv_weight_grad", mutates_args=(), schema=GRAD_SCHEMA)
def weight_grad_op(feats, v_out, table, workspace, backend):  # type: ignore[no-untyped-def]
    """Σ_o v_out[o] ⊗ feats[table[k, o]]: feats [num_in, Cin], v_out [num_out, Cout] -> [Cout, K, Cin]."""
    if feats.dtype in HALF_TYPES and not on_cuda_kernels(feats, backend):
        return weight_grad_op(feats.float(), v_out.float(), table, workspace, backend).to(feats.dtype)
    feats, v_out = feats.contiguous(), v_out.contiguous()
    (taps, num_out), cin, cout = table.shape, feats.shape[1], v_out.shape[1]
    if backend == "reference":
        grad = feats.new_zeros(cout, taps, cin)
        for k, rows in enumerate(table):
            outputs = torch.nonzero(rows >= 0)[:, 0]
            grad[:, k] = v_out[outputs].t() @ feats[rows[outputs].long()]
        return grad
    if on_cuda_kernels(feats, backend):
        total = torch.zeros(cout, taps * cin, device=feats.device, dtype=sum_dtype(feats))
        for start, size in chunks(num_out, taps * cin * feats.element_size(), workspace):
            columns = feats.new_empty(size, taps * cin)
            copy_columns("gather", feats, table, columns, start, size)
            total += v_out[start : start + size].t() @ columns
        return total.to(feats.dtype).view(cout, taps, cin)
    grad = feats.new_empty(cout, taps, cin)
    call(
        f"sparse_conv_weight_grad_{suffix(feats)}", feats, v_out, table, grad, len(feats), num_out, taps, cin,
        cout, device=feats.device,
    )  # fmt: skip
    return grad


@torch.library.custom_op("diff2to3::row_sum", mutates_args=(), schema="(Tensor feats, str backend) -> Tensor")
def row_sum_op(feats, backend):  # type: ignore[no-untyped-def]
    """Σ_n feats[n]: [N, C] -> [C], the gradient of a bias."""
    if feats.dtype in HALF_TYPES or backend == "reference" or on_cuda_kernels(feats, backend):
        return feats.sum(0)
    out = feats.new_empty(feats.shape[1])
    call(f"row_sum_{suffix(feats)}", feats.contiguous(), out, *feats.shape, device=feats.device)
    return out


def gather_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    mirrored: bool,
    transposed: bool,
    workspace: int,
    backend: str,
) -> Tensor:
    """out[o] = bias + Σ_k W_k · feats[table[k, o]]; ``mirrored`` takes the weight's taps in reverse."""
    if feats.dtype in HALF_TYPES and not on_cuda_kernels(feats, backend):
        args = (table, mirrored, transposed, workspace, backend)
        return gather_conv(feats.float(), weight.float(), as_float(bias), *args).to(feats.dtype)
    feats, weight = feats.contiguous(), weight.contiguous()
    (taps, num_out), (cin, cout) = table.shape, channels_of(weight, transposed)
    if backend == "reference":
        out = feats.new_zeros(num_out, cout)
        for k, rows in enumerate(table):
            outputs = torch.nonzero(rows >= 0)[:, 0]
            out[outputs] += feats[rows[outputs].long()] @ tap_matrix(weight, k, mirrored, transposed)
        return out if bias is None else out + bias
    out = feats.new_empty(num_out, cout)
    if on_cuda_kernels(feats, backend):
        ordered = weight.flip(1) if mirrored else weight
        matrix = ordered.permute(1, 0, 2) if transposed else ordered.permute(1, 2, 0)
        matrix = matrix.reshape(taps * cin, cout)
        for start, size in chunks(num_out, taps * cin * feats.element_size(), workspace):
            columns = feats.new_empty(size, taps * cin)
            copy_columns("gather", feats, table, columns, start, size)
            torch.mm(columns, matrix, out=out[start : start + size])
        return out if bias is None else out.add_(bias)
    call(
        f"sparse_conv_{suffix(feats)}", feats, weight, bias, table, None, out, num_out, taps, cin, cout,
        mirrored, transposed, device=feats.device,
    )  # fmt: skip
    return out


@submanifold_conv_op.register_fake
def _(feats, weight, bias, table, adjoint, workspace, backend):  # type: ignore[no-untyped-def]
    return feats.new_empty(table.shape[1], channels_of(weight, adjoint)[1])


@patch_conv_op.register_fake
def _(feats, weight, bias, children, parents, slots, adjoint, workspace, backend):  # type: ignore[no-untyped-def]
    return feats.new_empty(children.shape[1], channels_of(weight, adjoint)[1])


@unpatch_conv_op.register_fake
def _(feats, weight, bias, children, parents, slots, adjoint, workspace, backend):  # type: ignore[no-untyped-def]
    return feats.new_empty(parents.shape[0], channels_of(weight, adjoint)[1])


@weight_grad_op.register_fake
def _(feats, v_out, table, workspace, backend):  # type: ignore[no-untyped-def]
    return feats.new_empty(v_out.shape[1], table.shape[0], feats.shape[1])


@row_sum_op.register_fake
def _(feats, backend):  # type: ignore[no-untyped-def]
    return feats.new_empty(feats.shape[1])


# ---- gradients ----


def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    feats, weight, bias, *tables, ctx.adjoint, ctx.workspace, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(feats, weight, *tables)


def gradients(ctx, v_out, v_feats_op, weight_grad):  # type: ignore[no-untyped-def]
    """Gradients of feats, weight and bias; None for the tables and settings."""
    feats, weight, *tables = ctx.saved_tensors
    settings = (ctx.workspace, ctx.backend)
    v_out, v_feats, v_weight, v_bias = v_out.contiguous(), None, None, None
    if ctx.needs_input_grad[0]:
        v_feats = v_feats_op(v_out, weight, None, *tables, not ctx.adjoint, *settings)
    if ctx.needs_input_grad[1]:
        v_weight = weight_grad(feats, v_out, tables[0], settings)
        if ctx.adjoint:
            v_weight = v_weight.transpose(0, 2)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        v_bias = row_sum_op(v_out, ctx.backend)
    return v_feats, v_weight, v_bias, *(None,) * (len(tables) + 3)


def submanifold_backward(ctx, v_out):  # type: ignore[no-untyped-def]
    def weight_grad(feats, v_out, table, settings):  # type: ignore[no-untyped-def]
        return weight_grad_op(feats, v_out, table.flip(0) if ctx.adjoint else table, *settings)

    return gradients(ctx, v_out, submanifold_conv_op, weight_grad)


def patch_backward(ctx, v_out):  # type: ignore[no-untyped-def]
    def weight_grad(feats, v_out, children, settings):  # type: ignore[no-untyped-def]
        return weight_grad_op(feats, v_out, children, *settings)

    return gradients(ctx, v_out, unpatch_conv_op, weight_grad)


def unpatch_backward(ctx, v_out):  # type: ignore[no-untyped-def]
    def weight_grad(feats, v_out, children, settings):  # type: ignore[no-untyped-def]
        return weight_grad_op(v_out, feats, children, *settings).transpose(0, 2)

    return gradients(ctx, v_out, patch_conv_op, weight_grad)


submanifold_conv_op.register_autograd(submanifold_backward, setup_context=setup_context)
patch_conv_op.register_autograd(patch_backward, setup_context=setup_context)
unpatch_conv_op.register_autograd(unpatch_backward, setup_context=setup_context)


# ---- small parts ----


def channels_of(weight: Tensor, transposed: bool) -> tuple[int, int]:
    """Cin and Cout of a weight stored as [Cout, K, Cin], or [Cin, K, Cout] if transposed."""
    return (weight.shape[0], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[0])


def tap_matrix(weight: Tensor, tap: int, mirrored: bool, transposed: bool) -> Tensor:
    """[Cin, Cout] of one tap."""
    matrix = weight[:, -1 - tap if mirrored else tap]
    return matrix if transposed else matrix.t()


def on_cuda_kernels(feats: Tensor, backend: str) -> bool:
    return backend == "native" and target(feats.device) == "cuda"


def as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def sum_dtype(feats: Tensor) -> torch.dtype:
    return torch.float32 if feats.dtype in HALF_TYPES else feats.dtype


def chunks(count: int, row_bytes: int, workspace: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of pieces whose rows take at most ``workspace`` bytes together."""
    step = max(workspace // row_bytes, 1)
    return [(start, min(step, count - start)) for start in range(0, count, step)]


def copy_columns(direction: str, source: Tensor, table: Tensor, to: Tensor, start: int, size: int) -> None:
    """Gather columns for entries [start, start + size) of ``table``, or scatter columns back (CUDA)."""
    row_bytes = (source.shape[1] if direction == "gather" else to.shape[1]) * source.element_size()
    taps, num_out = table.shape
    call(
        f"{direction}_columns", source, table, to, start, size, num_out, taps, row_bytes, device=source.device
    )  # fmt: skip
