"""SMDiT's blocks (P3.2, figure 3): two streams with weights of their own, then one stream with shared ones.

    double   voxels ─norm, QKV─┐ ┌─ attention over both ─┐ ┌─out, MLP─▶ voxels
             image  ─norm, QKV─┘─┘                       └─└─out, MLP─▶ image
    single   a standard modulated transformer block on the packed tokens of both

Time modulates every norm and gates every branch (adaLN-Zero).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diff2to3.nn.attention import Attends, AttentionHooks, apply_rotary, attention
from diff2to3.nn.items import spread_by_item
from diff2to3.nn.streams import JointPlan, pack_streams, unpack_streams
from diff2to3.nn.transformer import FeedForward, HeadRMSNorm, LayerNorm, modulate, modulation

#: shift, scale and gate of the attention branch, then of the MLP branch.
NUM_PARTS = 6


@dataclass(frozen=True)
class Rows:
    """Whose time each row of a stream takes: ``index`` int64 [T], or None where all take the same."""

    index: Tensor | None

    def spread(self, values: Tensor) -> Tensor:
        """[B, C] to [T, C]; [1, C], which broadcasts, for a batch of one."""
        return spread_by_item(values, self.index)


@dataclass(frozen=True)
class BlockPlan:
    """Who attends to whom, and where everything is; shared by all blocks and all sampling steps.

    joint          both streams as one packed sequence
    voxels, image, packed   rows of each stream, and of the packed sequence
    rotary         (cosines, sines) [T, head_dim / 2] in packed order; None without rotary positions
    """

    joint: JointPlan
    voxels: Rows
    image: Rows
    packed: Rows
    rotary: tuple[Tensor, Tensor] | None


class Modulation(nn.Module):
    """Time embedding → six parts; with ``shared``, an offset to parts that all blocks share."""

    def __init__(self, width: int, shared: bool) -> None:
        super().__init__()
        self.layers = None if shared else modulation(width, NUM_PARTS)
        self.offset = nn.Parameter(torch.zeros(NUM_PARTS * width)) if shared else None

    def forward(self, time: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """time [B, D] (or the shared parts [B, 6 D]) → six of [T, D]."""
        if self.layers is None:
            assert self.offset is not None
            parts = time + self.offset.to(time.dtype)
        else:
            parts = self.layers(time)
        return tuple(rows.spread(part) for part in parts.chunk(NUM_PARTS, -1))


class Stream(nn.Module):
    """The weights of one transformer block, in the two halves between which attention happens."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, qk_rms_norm: bool, share_modulation: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_rms_norm = num_heads, qk_rms_norm
        self.modulation = Modulation(width, share_modulation)
        self.norm1 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_qkv = nn.Linear(width, 3 * width)
        if qk_rms_norm:
            self.q_rms_norm = HeadRMSNorm(width // num_heads, num_heads)
            self.k_rms_norm = HeadRMSNorm(width // num_heads, num_heads)
        self.to_out = nn.Linear(width, width)
        self.mlp = FeedForward(width, mlp_ratio)

    def qkv(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] → queries, keys and values [T, H, D/H]."""
        h = modulate(self.norm1(x), parts[0], parts[1])
        q, k, v = self.to_qkv(h).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if self.qk_rms_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Add the attention's output [T, H, D/H] to x, then the MLP's."""
        x = x + parts[2] * self.to_out(attended.flatten(1))
        h = modulate(self.norm2(x), parts[3], parts[4])
        return x + parts[5] * self.mlp(h)


class DoubleStreamBlock(Attends):
    """Voxels and image keep their own weights and attend jointly."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_rms_norm: bool = True,
        share_modulation: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.voxels = Stream(width, num_heads, mlp_ratio, qk_rms_norm, share_modulation)
        self.image = Stream(width, num_heads, mlp_ratio, qk_rms_norm, share_modulation)

    def forward(
        self,
        voxels: Tensor,
        image: Tensor,
        time: Tensor,
        plan: BlockPlan,
        hooks: AttentionHooks | None = None,
    ) -> tuple[Tensor, Tensor]:
        """voxels [M, D] and image [T, D] → the same; time [B, D] (or [B, 6 D], shared)."""
        parts_v, parts_i = self.voxels.modulation(time, plan.voxels), self.image.modulation(time, plan.image)
        streams = zip(self.voxels.qkv(voxels, parts_v), self.image.qkv(image, parts_i), strict=True)
        q, k, v = (pack_streams(a, b, plan.joint) for a, b in streams)
        attended = rotary_attention(q, k, v, plan, self.backend, hooks)
        out_v, out_i = unpack_streams(attended, plan.joint)
        return self.voxels.finish(voxels, out_v, parts_v), self.image.finish(image, out_i, parts_i)


class SingleStreamBlock(Attends):
    """A standard modulated transformer block on the packed tokens of both modalities."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_rms_norm: bool = True,
        share_modulation: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.stream = Stream(width, num_heads, mlp_ratio, qk_rms_norm, share_modulation)

    def forward(
        self, x: Tensor, time: Tensor, plan: BlockPlan, hooks: AttentionHooks | None = None
    ) -> Tensor:
        """x [M + T, D] in packed order → the same."""
        parts = self.stream.modulation(time, plan.packed)
        attended = rotary_attention(*self.stream.qkv(x, parts), plan, self.backend, hooks)
        return self.stream.finish(x, attended, parts)


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, backend: str, hooks: AttentionHooks | None
) -> Tensor:
    """Attention over the packed rows, queries and keys turned where the plan has positions."""
    if plan.rotary is not None:
        q, k = apply_rotary(q, *plan.rotary), apply_rotary(k, *plan.rotary)
    return attention(q, k, v, plan.joint, backend=backend, hooks=hooks)
