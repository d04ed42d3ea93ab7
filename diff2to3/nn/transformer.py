"""Transformer blocks over packed tokens [T, D]: who attends to whom is in the plan that the caller passes.

Parameter names and shapes are TRELLIS's, so that its released weights load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.nn.attention import Attends, AttentionHooks, Plan, attention, rms_norm_heads
from diff2to3.nn.items import spread_by_item


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 (or better) whatever the input's dtype; returns that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(precise) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(precise), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class HeadRMSNorm(nn.Module):
    """See :func:`diff2to3.nn.attention.rms_norm_heads`."""

    def __init__(self, head_width: int, num_heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, head_width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_heads(x, self.gamma)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class SelfAttention(Attends):
    """Multi-head self-attention, optionally with RMS-normalised queries and keys."""

    def __init__(self, width: int, num_heads: int, qk_rms_norm: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.to_qkv = nn.Linear(width, 3 * width)
        if qk_rms_norm:
            self.q_rms_norm = HeadRMSNorm(width // num_heads, num_heads)
            self.k_rms_norm = HeadRMSNorm(width // num_heads, num_heads)
        self.qk_rms_norm = qk_rms_norm
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, plan: Plan, hooks: AttentionHooks | None = None) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if self.qk_rms_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        out = attention(q, k, v, plan, backend=self.backend, hooks=hooks)
        return self.to_out(out.flatten(1))


class CrossAttention(Attends):
    """Multi-head attention from tokens [T, D] to a packed context [Tc, Dc]."""

    def __init__(
        self,
        width: int,
        context_width: int,
        num_heads: int,
        qk_rms_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context_width, 2 * width)
        if qk_rms_norm:
            self.q_rms_norm = HeadRMSNorm(width // num_heads, num_heads)
            self.k_rms_norm = HeadRMSNorm(width // num_heads, num_heads)
        self.qk_rms_norm = qk_rms_norm
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, plan: Plan, hooks: AttentionHooks | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        if self.qk_rms_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        out = attention(q, k, v, plan, backend=self.backend, hooks=hooks)
        return self.to_out(out.flatten(1))


class TransformerBlock(nn.Module):
    """x + attention(norm x), then + MLP(norm x)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_rms_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, num_heads, qk_rms_norm, backend)
        self.mlp = FeedForward(width, mlp_ratio)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        x = x + self.attn(self.norm1(x), plan)
        return x + self.mlp(self.norm2(x))


class ModulatedCrossBlock(nn.Module):
    """Self-attention, cross-attention and MLP; time modulates the first and the last (adaLN, DiT).

    With ``share_modulation`` the caller passes the six modulations, else the block makes them of the time
    embedding.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
        share_modulation: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = LayerNorm(width, elementwise_affine=True, eps=1e-6)
        self.norm3 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.self_attn = SelfAttention(width, num_heads, qk_rms_norm, backend)
        self.cross_attn = CrossAttention(width, context_width, num_heads, qk_rms_norm_cross, backend)
        self.mlp = FeedForward(width, mlp_ratio)
        self.share_modulation = share_modulation
        if not share_modulation:
            self.adaLN_modulation = modulation(width, 6)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        self_plan: Plan,
        cross_plan: Plan,
        batch_index: Tensor | None = None,
        cross_hooks: AttentionHooks | None = None,
    ) -> Tensor:
        """x [T, D], context [Tc, Dc], time [B, D] (or [B, 6 D] with shared modulation).

        batch_index [T] says whose time a token takes; None where all take the same (B = 1).
        """
        parts = time if self.share_modulation else self.adaLN_modulation(time)
        shift1, scale1, gate1, shift2, scale2, gate2 = spread_by_item(parts, batch_index).chunk(6, -1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.self_attn(h, self_plan)
        x = x + self.cross_attn(self.norm2(x), context, cross_plan, cross_hooks)
        h = modulate(self.norm3(x), shift2, scale2)
        return x + gate2 * self.mlp(h)


def modulation(width: int, num_parts: int) -> nn.Sequential:
    """SiLU and Linear from the time embedding to shifts, scales and gates; starts at zero (adaLN-Zero)."""
    layers = nn.Sequential(nn.SiLU(), nn.Linear(width, num_parts * width))
    zero_parameters(layers)
    return layers


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below ``module`` (TRELLIS's initialisation)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def zero_parameters(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def final_norm(x: Tensor) -> Tensor:
    """Layer norm without parameters before an output layer."""
    return F.layer_norm(x, x.shape[-1:])
