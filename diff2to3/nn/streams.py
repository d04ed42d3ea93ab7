"""Two packed streams as one: joint attention of voxel tokens and image tokens without padding either."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diff2to3.nn.sequences import SequencePlan, cumulative, lengths_from_cu_seqlens, permute_rows


@dataclass(frozen=True)
class JointPlan:
    """Two streams (say voxel tokens and image tokens) of a batch, attended jointly per batch item without
    padding.

    num_a, num_b  rows of each stream
    order     int64 [Ta + Tb]: rows of cat(a, b) such that item i is its a rows, then its b rows; None: cat
              is already so
    inverse   the way back
    sequences the plan of the packed rows
    batch_index  int64 [Ta + Tb]: batch item of each packed row
    """

    num_a: int
    num_b: int
    order: Tensor | None
    inverse: Tensor | None
    sequences: SequencePlan
    batch_index: Tensor

    @staticmethod
    def build(cu_seqlens_a: Tensor, cu_seqlens_b: Tensor) -> JointPlan:
        """From the boundaries [B + 1] of both streams; ValueError unless they have the same number of
        items.
        """
        lengths_a = lengths_from_cu_seqlens(cu_seqlens_a, "cu_seqlens_a")
        lengths_b = lengths_from_cu_seqlens(cu_seqlens_b, "cu_seqlens_b")
        if len(lengths_a) != len(lengths_b):
            raise ValueError(
                f"cu_seqlens_b: expected {len(lengths_a)} sequences as in cu_seqlens_a, got {len(lengths_b)}"
            )
        device = cu_seqlens_a.device
        joint = [a + b for a, b in zip(lengths_a, lengths_b, strict=True)]
        sequences = SequencePlan.from_lengths(joint, device=device)
        batch_index = torch.repeat_interleave(
            torch.arange(len(joint)), torch.tensor(joint, dtype=torch.int64)
        )
        num_a, num_b = sum(lengths_a), sum(lengths_b)
        if len(joint) <= 1:
            return JointPlan(num_a, num_b, None, None, sequences, batch_index.to(device))
        bounds_a, bounds_b = cumulative(lengths_a), cumulative(lengths_b) + num_a
        parts = [
            np.arange(bounds[i], bounds[i + 1]) for i in range(len(joint)) for bounds in (bounds_a, bounds_b)
        ]
        rows = np.concatenate(parts)
        back = np.empty_like(rows)
        back[rows] = np.arange(len(rows))
        order, inverse = (torch.from_numpy(x).to(device) for x in (rows, back))
        return JointPlan(num_a, num_b, order, inverse, sequences, batch_index.to(device))


def pack_streams(a: Tensor, b: Tensor, plan: JointPlan) -> Tensor:
    """[Ta, …] and [Tb, …] to [Ta + Tb, …], each batch item's rows together: first its a rows, then its b
    rows.
    """
    if a.shape[0] != plan.num_a or b.shape[0] != plan.num_b:
        raise ValueError(
            f"a, b: expected {plan.num_a} and {plan.num_b} rows as in the plan, "
            f"got {a.shape[0]} and {b.shape[0]}"
        )
    both = torch.cat([a, b])
    return both if plan.order is None else permute_rows(both, plan.order, plan.inverse)


def unpack_streams(packed: Tensor, plan: JointPlan) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_streams`."""
    if packed.shape[0] != plan.num_a + plan.num_b:
        raise ValueError(
            f"packed: expected {plan.num_a + plan.num_b} rows as in the plan, got {packed.shape[0]}"
        )
    both = packed if plan.order is None else permute_rows(packed, plan.inverse, plan.order)
    return both[: plan.num_a], both[plan.num_a :]
