"""The sums of products that sparse convolutions and their gradients are made of, computed in three ways.

    reference       one gather, matrix product and scatter per tap
    native, CPU     csrc/cpu/sparse_conv.cpp: products over the pairs of rows that exist, read and added to
                    where they lie
    native, CUDA    the rows of a chunk of outputs gathered into columns (csrc/cuda/sparse_gather.cu), then
                    one matrix product of torch's per chunk; where the output is much narrower, the products
                    with all taps first and their rows gathered and added; ``workspace`` bounds both

Half types are computed in float32 and rounded once, except on CUDA: torch's products do the same there, but those that
come first are rounded before they are added, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import call, target
from .patchify import HALF_TYPES, suffix


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
    """out[o] = bias + Σ_k W_k · feats[table[k, o]]: [num_in, Cin] -> [num_out, Cout].

    weight [Cout, K, Cin], or [Cin, K, Cout] if ``transposed``; ``mirrored`` takes its taps in reverse.
    """
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
        if product_first(len(feats), num_out, cin, cout):
            out = products_then_rows(feats, matrix, table, workspace).to(feats.dtype)
            return out if bias is None else out.add_(bias)
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


def product_first(num_in: int, num_out: int, cin: int, cout: int) -> bool:
    """Whether to multiply before gathering: as many products where there are no more inputs than outputs, and the
    gathered rows, whose traffic bounds the time, are at most half as wide.
    """
    return 2 * cout <= cin and num_in <= num_out


def products_then_rows(feats: Tensor, matrices: Tensor, table: Tensor, workspace: int) -> Tensor:
    """out[o] = Σ_k (feats · matrices[k])[table[k, o]]: matrices [K, Cin, Cout] -> [num_out, Cout], float32 or better.

    As many taps at a time as ``workspace`` holds the products and the gathered rows of; always in the same order.
    """
    (taps, num_out), cout = table.shape, matrices.shape[2]
    precise = torch.promote_types(feats.dtype, torch.float32)
    total = feats.new_zeros(num_out, cout, dtype=precise)
    tap_bytes = (len(feats) + num_out) * cout * feats.element_size()
    for start, size in chunks(taps, max(tap_bytes, 1), workspace):
        group = matrices[start : start + size].permute(1, 0, 2).reshape(-1, size * cout)
        products = (feats @ group).view(-1, cout)  # row n·size + k: feats[n] times the group's tap k
        steps = torch.arange(size, dtype=table.dtype, device=table.device)[:, None]
        rows = table[start : start + size]
        rows = torch.where(rows >= 0, rows * size + steps, -1)
        columns = feats.new_empty(num_out, size * cout)
        copy_columns("gather", products, rows, columns, 0, num_out)
        total += columns.view(num_out, size, cout).sum(1, dtype=precise)
    return total


def slot_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    children: Tensor,
    parents: Tensor,
    slots: Tensor,
    transposed: bool,
    workspace: int,
    backend: str,
) -> Tensor:
    """out[n] = bias + W_slots[n] · feats[parents[n]]: [M, Cin] -> [N, Cout]; ``weight`` as in gather_conv."""
    if feats.dtype in HALF_TYPES and not on_cuda_kernels(feats, backend):
        args = (children, parents, slots, transposed, workspace, backend)
        return slot_conv(feats.float(), weight.float(), as_float(bias), *args).to(feats.dtype)
    feats, weight = feats.contiguous(), weight.contiguous()
    taps, (cin, cout) = weight.shape[1], channels_of(weight, transposed)
    out = feats.new_empty(len(parents), cout)
    if backend == "reference":
        for k in range(taps):
            rows = torch.nonzero(slots == k)[:, 0]
            out[rows] = feats[parents[rows].long()] @ tap_matrix(weight, k, False, transposed)
        return out if bias is None else out + bias
    if on_cuda_kernels(feats, backend):
        matrix = (weight if transposed else weight.permute(2, 1, 0)).reshape(cin, taps * cout)
        for start, size in chunks(len(feats), taps * cout * feats.element_size(), workspace):
            columns = feats[start : start + size] @ matrix
            copy_columns("scatter", columns, children, out, start, size)
        return out if bias is None else out.add_(bias)
    call(
        f"sparse_conv_{suffix(feats)}", feats, weight, bias, parents, slots, out, len(parents), taps, cin,
        cout, False, transposed, device=feats.device,
    )  # fmt: skip
    return out


def weight_grad(feats: Tensor, v_out: Tensor, table: Tensor, workspace: int, backend: str) -> Tensor:
    """Σ_o v_out[o] ⊗ feats[table[k, o]]: feats [num_in, Cin], v_out [num_out, Cout] -> [Cout, K, Cin]."""
    if feats.dtype in HALF_TYPES and not on_cuda_kernels(feats, backend):
        return weight_grad(feats.float(), v_out.float(), table, workspace, backend).to(feats.dtype)
    feats, v_out = feats.contiguous(), v_out.contiguous()
    (taps, num_out), cin, cout = table.shape, feats.shape[1], v_out.shape[1]
    if backend == "reference":
        grad = feats.new_zeros(cout, taps, cin)
        for k, rows in enumerate(table):
            outputs = torch.nonzero(rows >= 0)[:, 0]
            grad[:, k] = v_out[outputs].t() @ feats[rows[outputs].long()]
        return grad
    if on_cuda_kernels(feats, backend):
        dtype = torch.float32 if feats.dtype in HALF_TYPES else feats.dtype
        total = torch.zeros(cout, taps * cin, device=feats.device, dtype=dtype)
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


def row_sum(feats: Tensor, backend: str) -> Tensor:
    """Σ_n feats[n]: [N, C] -> [C], the gradient of a bias."""
    if feats.dtype in HALF_TYPES or backend == "reference" or on_cuda_kernels(feats, backend):
        return feats.sum(0)
    out = feats.new_empty(feats.shape[1])
    call(f"row_sum_{suffix(feats)}", feats.contiguous(), out, *feats.shape, device=feats.device)
    return out


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
