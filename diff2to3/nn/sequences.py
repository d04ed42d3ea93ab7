"""Which query sees which key: frozen plans for attention over packed sequences of different lengths.

Attention works on sequences packed one after another (``cu_seqlens``), or scattered over the rows (windows).
Library kernels want rectangles. A :class:`SequencePlan` is built once, on the host, and tells how to get
from one to the other: sequences of similar length share a padded *bucket*, chosen to minimise estimated
time, so that hundreds of windows become a handful of batched calls; long sequences are taken alone, as
slices, without copying or padding anything.

    rows [T, H, D] ─gather─▶ buckets [n, L, H, D] ─one attention call each─▶ [n, L, H, D] ─gather─▶ [T, H, D]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: A sequence with at least this many (query, key) pairs fills the machine alone and is never padded to
#: another's length.
LONG_SEQUENCE = 1 << 20
#: Cost of one more attention call, in (query, key) pairs: the best of several on a CPU (flat from 4,096 to
#: 65,536), estimated for accelerators from 50 µs of launches at 30 TFLOPS.
CALL_COST = {"cpu": 16384.0, "accelerator": 262144.0}
#: Cost of moving one row in and out, and the slowdown by a mask, in the same unit.
ROW_COST = 12.0
MASK_COST = 1.05
#: Distinct lengths above which lengths are first rounded up, to keep building a plan fast.
MAX_DISTINCT = 256


@dataclass(frozen=True)
class Bucket:
    """``num`` sequences padded to ``len_q`` queries and ``len_k`` keys, stored one after another.

    start_q, start_k  first row in the (padded) queries and keys
    mask              bool [num, 1, 1, len_k], True at real keys; None where nothing is padded
    """

    num: int
    len_q: int
    len_k: int
    start_q: int
    start_k: int
    mask: Tensor | None


@dataclass(frozen=True)
class RowMap:
    """Rows laid out with padding, and the way back.

    index     int64 [P]: source row of each padded row. Padding repeats a row of its own sequence, so that
              nothing, not even a NaN, crosses between sequences
    target    int64 [P]: the same, but T for padding
    inverse   int64 [T]: where each row went; P for rows that are in no bucket
    complete  whether every row is in a bucket
    """

    index: Tensor
    target: Tensor
    inverse: Tensor
    complete: bool


@dataclass(frozen=True)
class VarlenLayout:
    """The non-empty sequences as kernels for packed sequences want them.

    rows_q, rows_k  int64, rows in sequence order; None where the rows already are in it
    cu_q, cu_k      int32 [S' + 1]
    """

    rows_q: Tensor | None
    rows_k: Tensor | None
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor


@dataclass(frozen=True)
class SequencePlan:
    """S sequences over the query rows and the key rows; queries of sequence i see the keys of sequence i.

    lengths_q, lengths_k  S lengths each; 0 is allowed (queries without keys get zeros)
    order     int64 [T]: rows in sequence order, for self-attention over scattered rows; None: packed already
    buckets   the batched calls
    map_q, map_k  how rows get into the buckets; None where buckets are plain slices of the rows
    varlen    the same for kernels that take packed sequences
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    order: Tensor | None
    buckets: tuple[Bucket, ...]
    map_q: RowMap | None
    map_k: RowMap | None
    varlen: VarlenLayout

    @property
    def num_sequences(self) -> int:
        return len(self.lengths_q)

    @property
    def num_q(self) -> int:
        return sum(self.lengths_q)

    @property
    def num_k(self) -> int:
        return sum(self.lengths_k)

    @property
    def padding(self) -> float:
        """Share of the (query, key) pairs computed that are padding."""
        real = sum(q * k for q, k in zip(self.lengths_q, self.lengths_k, strict=True))
        done = sum(b.num * b.len_q * b.len_k for b in self.buckets)
        return 1 - real / done if done else 0.0

    def rows(self, sequence: int, *, keys: bool = False) -> Tensor:
        """Rows (int64) of one sequence among the queries (or the keys)."""
        lengths = self.lengths_k if keys else self.lengths_q
        start = sum(lengths[:sequence])
        device = self.varlen.cu_q.device
        rows = torch.arange(start, start + lengths[sequence], device=device)
        return rows if self.order is None else self.order[rows]

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None) -> SequencePlan:
        """From boundaries [S + 1]: rows of sequence i are ``cu_seqlens[i]:cu_seqlens[i+1]``.

        ``cu_seqlens_k``: boundaries among the keys, for cross-attention. ValueError for anything that does
        not start at 0, decreases, or has another number of sequences.
        """
        lengths_q = lengths_from_cu_seqlens(cu_seqlens, "cu_seqlens")
        lengths_k = (
            lengths_q if cu_seqlens_k is None else lengths_from_cu_seqlens(cu_seqlens_k, "cu_seqlens_k")
        )
        return SequencePlan.from_lengths(lengths_q, lengths_k, device=cu_seqlens.device)

    @staticmethod
    def from_lengths(
        lengths_q: Sequence[int],
        lengths_k: Sequence[int] | None = None,
        *,
        order: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> SequencePlan:
        """From lengths known on the host. ``order`` (self-attention only): rows in sequence order."""
        queries = tuple(int(n) for n in lengths_q)
        keys = queries if lengths_k is None else tuple(int(n) for n in lengths_k)
        if len(queries) != len(keys):
            raise ValueError(
                f"cu_seqlens_k: {len(queries)} sequences of queries, but {len(keys)} of keys; give one each"
            )
        if min(queries + keys, default=0) < 0:
            raise ValueError("lengths: expected no negative length")
        if order is not None:
            if keys != queries or order.shape != (sum(queries),):
                raise ValueError(
                    f"order: expected [{sum(queries)}] rows and equal lengths of queries and keys"
                )
            device = order.device
        device = torch.device(device or "cpu")
        buckets, index_q, index_k = lay_out_buckets(queries, keys, device, may_slice=order is None)
        map_q = None if index_q is None else row_map(index_q, sum(queries), order, device)
        if index_k is index_q:
            map_k = map_q
        else:
            map_k = None if index_k is None else row_map(index_k, sum(keys), order, device)
        varlen = varlen_layout(queries, keys, order, device)
        return SequencePlan(queries, keys, order, buckets, map_q, map_k, varlen)


def lengths_from_cu_seqlens(cu_seqlens: Tensor, name: str) -> tuple[int, ...]:
    """Lengths on the host, checked; ``name`` is for the message."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: expected int32 or int64 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name}: expected to start with 0, got {bounds[0]}")
    lengths = tuple(stop - start for start, stop in itertools.pairwise(bounds))
    if min(lengths, default=0) < 0:
        raise ValueError(
            f"{name}: expected non-decreasing boundaries, got a sequence of length {min(lengths)}"
        )
    return lengths


def cumulative(lengths: Sequence[int]) -> np.ndarray:
    """[0, n_0, n_0 + n_1, …]"""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def choose_groups(lengths_q: np.ndarray, lengths_k: np.ndarray, call_cost: float) -> list[np.ndarray]:
    """Split sequences (indices, all non-empty) into groups that share a bucket, at the least estimated time.

    Over sequences sorted by length this is a shortest path: cost(i, j) of one bucket that holds the distinct
    lengths i..j is its padded pairs and rows plus one call.
    """
    pairs = lengths_q * lengths_k
    alone = np.flatnonzero(pairs >= LONG_SEQUENCE)
    rest = np.flatnonzero(pairs < LONG_SEQUENCE)
    groups = [np.array([i]) for i in alone]
    if not len(rest):
        return groups
    sizes = np.stack([lengths_k[rest], lengths_q[rest]], 1)
    step = 1
    distinct, which, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    while len(distinct) > MAX_DISTINCT:
        step *= 2
        rounded = -(-sizes // step) * step
        distinct, which, counts = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)

    best = np.zeros(len(distinct) + 1)
    previous = np.zeros(len(distinct) + 1, np.int64)
    for j in range(1, len(distinct) + 1):
        len_k, len_q = np.maximum.accumulate(distinct[:j][::-1], axis=0)[::-1].T
        num = counts[:j][::-1].cumsum()[::-1]
        masked = np.where(np.arange(j) < j - 1, MASK_COST, 1.0)
        cost = num * (len_q * len_k * masked + ROW_COST * (len_q + len_k)) + call_cost
        previous[j] = int(np.argmin(best[:j] + cost))
        best[j] = (best[:j] + cost)[previous[j]]
    j = len(distinct)
    while j > 0:
        i = int(previous[j])
        groups.append(rest[np.flatnonzero((which >= i) & (which < j))])
        j = i
    return groups


def lay_out_buckets(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], device: torch.device, *, may_slice: bool
) -> tuple[tuple[Bucket, ...], np.ndarray | None, np.ndarray | None]:
    """Buckets, and for queries and keys the packed row of every padded row (-1 - row for padding); None for
    slices.
    """
    len_q, len_k = np.asarray(lengths_q, np.int64), np.asarray(lengths_k, np.int64)
    start_q, start_k = cumulative(lengths_q), cumulative(lengths_k)
    live = np.flatnonzero((len_q > 0) & (len_k > 0))
    call_cost = CALL_COST["cpu" if device.type == "cpu" else "accelerator"]
    groups = [live[g] for g in choose_groups(len_q[live], len_k[live], call_cost)] if len(live) else []
    groups.sort(key=lambda group: int(group[0]))

    if may_slice and all(is_slice(group, len_q, len_k) for group in groups):
        buckets = [
            Bucket(len(g), int(len_q[g[0]]), int(len_k[g[0]]), int(start_q[g[0]]), int(start_k[g[0]]), None)
            for g in groups
        ]
        return tuple(buckets), None, None

    buckets, index_q, index_k = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    filled_q = filled_k = 0
    for group in groups:
        q, k = int(len_q[group].max()), int(len_k[group].max())
        mask = None
        if int(len_k[group].min()) < k:
            real = torch.from_numpy(np.arange(k) < len_k[group][:, None]).to(device)
            mask = real[:, None, None, :]
        buckets.append(Bucket(len(group), q, k, filled_q, filled_k, mask))
        index_q.append(padded_rows(start_q[group], len_q[group], q))
        index_k.append(padded_rows(start_k[group], len_k[group], k))
        filled_q += len(group) * q
        filled_k += len(group) * k
    flat_q = np.concatenate(index_q)
    flat_k = flat_q if lengths_k == lengths_q else np.concatenate(index_k)
    return tuple(buckets), flat_q, flat_k


def is_slice(group: np.ndarray, len_q: np.ndarray, len_k: np.ndarray) -> bool:
    """Whether the sequences of ``group`` are neighbours of equal lengths: a slice that reshapes to a
    rectangle.
    """
    neighbours = int(group[-1]) - int(group[0]) == len(group) - 1
    return neighbours and len(set(len_q[group])) == 1 and len(set(len_k[group])) == 1


def padded_rows(starts: np.ndarray, lengths: np.ndarray, padded: int) -> np.ndarray:
    """[n * padded] rows; a padding slot holds -1 - (last row of its sequence)."""
    slot = np.arange(padded)
    rows = starts[:, None] + np.minimum(slot, lengths[:, None] - 1)
    return np.where(slot < lengths[:, None], rows, -1 - rows).reshape(-1)


def row_map(flat: np.ndarray, num_rows: int, order: Tensor | None, device: torch.device) -> RowMap:
    """From packed rows with padding marked to indices into the caller's rows."""
    real = flat >= 0
    inverse = np.full(num_rows, len(flat), np.int64)
    inverse[flat[real]] = np.flatnonzero(real)
    index = torch.from_numpy(np.where(real, flat, -1 - flat)).to(device)
    padding = torch.from_numpy(~real).to(device)
    back = torch.from_numpy(inverse).to(device)
    if order is not None:
        index = order[index]
        back = torch.empty_like(back).index_copy(0, order, back)
    complete = int(real.sum()) == num_rows
    return RowMap(index, index.masked_fill(padding, num_rows), back, complete)


def varlen_layout(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], order: Tensor | None, device: torch.device
) -> VarlenLayout:
    """Drop sequences without queries or keys, which some kernels do not take."""
    live = [i for i in range(len(lengths_q)) if lengths_q[i] and lengths_k[i]]
    live_q, live_k = tuple(lengths_q[i] for i in live), tuple(lengths_k[i] for i in live)
    rows_q = rows_k = order
    if sum(live_q) < sum(lengths_q):
        packed = torch.from_numpy(sequence_rows(cumulative(lengths_q), live)).to(device)
        rows_q = packed if order is None else order[packed]
    if sum(live_k) < sum(lengths_k):
        packed = torch.from_numpy(sequence_rows(cumulative(lengths_k), live)).to(device)
        rows_k = packed if order is None else order[packed]
    cu_q = torch.from_numpy(cumulative(live_q)).to(device, torch.int32)
    cu_k = torch.from_numpy(cumulative(live_k)).to(device, torch.int32)
    return VarlenLayout(rows_q, rows_k, live_q, live_k, cu_q, cu_k)


def sequence_rows(bounds: np.ndarray, sequences: list[int]) -> np.ndarray:
    """Rows of the given sequences, one after another."""
    parts = [np.arange(bounds[i], bounds[i + 1]) for i in sequences]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def permute_rows(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    """``x[order]`` for a permutation, with a gather (not a scatter-add) as its gradient."""
    result: Tensor = _TakeRows.apply(x, order, inverse)
    return result


def pad_rows(x: Tensor, rows: RowMap) -> Tensor:
    """[T, …] to [P, …]. The gradient takes padding for a constant: whoever reads it must not use padding."""
    if rows.complete:
        result: Tensor = _TakeRows.apply(x, rows.index, rows.inverse)
        return result
    return x.index_select(0, rows.index)


def unpad_rows(x: Tensor, rows: RowMap) -> Tensor:
    """[P, …] to [T, …]; rows that are in no bucket get zeros."""
    if not rows.complete:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    result: Tensor = _CollectRows.apply(x, rows.inverse)
    return result


class _TakeRows(torch.autograd.Function):
    """x[index], where x[index][inverse] = x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, v_out: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return v_out.index_select(0, inverse), None, None


class _CollectRows(torch.autograd.Function):
    """x[index], where no row is taken twice, except for the row of zeros that unpad_rows appends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, v_out: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        v_x = v_out.new_zeros(ctx.num_rows, *v_out.shape[1:])
        return v_x.index_copy(0, index, v_out), None
