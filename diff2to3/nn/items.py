"""Packed rows and the batch item that each belongs to: spread values over rows, and sum or average rows.

An item has thousands of rows, so sums over them are taken in float32 (or better) whatever the rows' dtype: bfloat16
stops counting at 256. PyTorch's own gradient of ``values[index]`` adds in the values' dtype, and on CUDA in an order
that differs from run to run; the sums here are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Rows that are widened to float32 at a time on a CPU, where a copy of all of them would leave the cache.
CHUNK = 1024


def spread_by_item(values: Tensor, index: Tensor | None) -> Tensor:
    """[B, C] to [T, C]: row t takes the values of item ``index[t]`` (int64 [T]).

    None, for a batch of one, leaves [1, C], which broadcasts.
    """
    if index is None:
        return values
    result: Tensor = _Spread.apply(values, index)
    return result


def sum_by_item(rows: Tensor, index: Tensor, num_items: int) -> Tensor:
    """[T, C] to [B, C] in float32 or better: the sum of each item's rows; 0 for an item without rows."""
    result: Tensor = _Sum.apply(rows, index, num_items)
    return result


def mean_row_by_item(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of each item's rows: packed [N, C] → [B, C]; 0 for an item without rows."""
    lengths = cu_seqlens.diff().long()
    item = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
    means = sum_by_item(rows, item, len(lengths)) / lengths.clamp(min=1)[:, None]
    return means.to(rows.dtype)


def mean_by_item(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over the numbers of each item's rows: packed [N, C] → [B]; 0 for an item without rows."""
    return mean_row_by_item(rows.mean(1, keepdim=True), cu_seqlens)[:, 0]


class _Spread(torch.autograd.Function):
    """values[index]; its gradient is :class:`_Sum`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_items, ctx.dtype = values.shape[0], values.dtype
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, v_out: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return sum_by_item(v_out, index, ctx.num_items).to(ctx.dtype), None


class _Sum(torch.autograd.Function):
    """The sums of each item's rows; their gradient is :class:`_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_items: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dtype = rows.dtype
        with torch.autocast(rows.device.type, enabled=False):
            return (
                sum_in_order(rows, index, num_items)
                if rows.is_cpu
                else sum_by_product(rows, index, num_items)
            )

    @staticmethod
    def backward(ctx: Any, v_out: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return spread_by_item(v_out.to(ctx.dtype), index), None, None


def sum_in_order(rows: Tensor, index: Tensor, num_items: int) -> Tensor:
    """Row after row; quick on a CPU."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    sums = rows.new_zeros(num_items, rows.shape[1], dtype=precise)
    if rows.dtype == precise:
        return sums.index_add_(0, index, rows)
    for part, where in zip(rows.split(CHUNK), index.split(CHUNK), strict=True):
        sums.index_add_(0, where, part.to(precise))
    return sums


def sum_by_product(rows: Tensor, index: Tensor, num_items: int) -> Tensor:
    """A matrix of zeros and ones [B, T] times the rows: on a GPU one deterministic launch, where adding row by row is
    neither.

    The factors are exact in every dtype (TF32 too, for half-precision rows), and tensor cores add in float32.
    """
    precise = torch.promote_types(rows.dtype, torch.float32)
    ones = index == torch.arange(num_items, device=index.device)[:, None]
    if rows.is_cuda and rows.dtype != precise and has_out_dtype():
        product: Tensor = torch.mm(ones.to(rows.dtype), rows, out_dtype=precise)
        return product
    return ones.to(precise) @ rows.to(precise)


def has_out_dtype() -> bool:
    """Whether torch.mm takes half-precision factors to a float32 product (2.8 and later, on CUDA)."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
