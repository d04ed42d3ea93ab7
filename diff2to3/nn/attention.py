"""Attention over packed sequences: full, windowed, joint and cross, with one function and a choice of
libraries.

    plan = SequencePlan.from_cu_seqlens(cu_seqlens)            full attention within each batch item
    plan = SequencePlan.from_cu_seqlens(cu_seqlens, cu_cond)   cross-attention
    plan = WindowPlan.build(coords, window=8, shift=4)         within 3D windows
    plan = JointPlan.build(cu_voxels, cu_image)                over two packed streams (pack_streams,
    unpack_streams) out = attention(q, k, v, plan)

Plans are built once and shared by all layers. Backends:

    auto        torch; "varlen" for half precision on CUDA where windows would need padding, else "sdpa"
    sdpa        torch's scaled_dot_product_attention on buckets of similar length, any device and dtype
    varlen      torch's own kernel for packed sequences (CUDA, half precision, torch >= 2.10)
    xformers    memory_efficient_attention with a block-diagonal mask
    flash_attn  flash_attn_varlen_func (CUDA, half precision)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff2to3.errors import MissingDependencyError
from diff2to3.nn.sequences import Bucket, RowMap, SequencePlan, pad_rows, unpad_rows
from diff2to3.nn.streams import JointPlan
from diff2to3.nn.windows import WindowPlan

BACKENDS = ("auto", "sdpa", "varlen", "xformers", "flash_attn")
#: The exact path holds at most this many logits at once, over all heads.
MAX_LOGITS = 1 << 24

Plan = SequencePlan | WindowPlan | JointPlan
PerSequence = Callable[[int], Tensor | None]


class Attends(nn.Module):
    """A layer that calls :func:`attention` with ``backend``, one of :data:`BACKENDS`."""

    backend: str


@dataclass(frozen=True)
class AttentionHooks:
    """What to change or watch in one attention call. It then takes a slower exact path, with gradients.

    logits[h, i, j] = logit_scale · scale · q_i·k_j + logit_bias, in float32 or better.

    logit_scale, logit_bias  sequence number -> tensor that broadcasts to [H, Lq, Lk], or None for no change.
                 A list of tensors serves as ``biases.__getitem__``
    heads        whose probabilities to report
    on_probs     called once a sequence with (sequence number, probabilities [len(heads), Lq, Lk])

    ``SequencePlan.rows`` tells which rows a sequence has.
    """

    logit_scale: PerSequence | None = None
    logit_bias: PerSequence | None = None
    heads: tuple[int, ...] = ()
    on_probs: Callable[[int, Tensor], None] | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    hooks: AttentionHooks | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v within each sequence of ``plan``.

    q [Tq, H, D], k [Tk, H, D], v [Tk, H, Dv]; returns [Tq, H, Dv]. Queries of a sequence without keys get
    zeros.
    plan     which query sees which key; a tensor is taken for cu_seqlens (better built once, as a plan)
    scale    1/√D unless given
    hooks    change or watch the logits (``backend`` is then ignored)
    ValueError for shapes or dtypes that do not fit or an unknown backend; MissingDependencyError names what
    to install.
    """
    sequences = as_sequences(plan)
    check_inputs(q, k, v, sequences)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if hooks is not None:
        return exact_attention(q, k, v, sequences, scale, hooks)
    if backend == "auto":
        backend = automatic_backend(q, v, sequences)
    if backend == "sdpa":
        return bucketed_attention(q, k, v, sequences, scale)
    return varlen_attention(q, k, v, sequences, scale, backend)


def as_sequences(plan: Plan | Tensor) -> SequencePlan:
    """The plan of the rows, whatever it was built for."""
    if isinstance(plan, Tensor):
        return SequencePlan.from_cu_seqlens(plan)
    return plan if isinstance(plan, SequencePlan) else plan.sequences


def check_inputs(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan) -> None:
    for name, x, rows in (("q", q, plan.num_q), ("k", k, plan.num_k), ("v", v, plan.num_k)):
        if x.ndim != 3:
            raise ValueError(f"{name}: expected [T, H, D], got {list(x.shape)}")
        if x.shape[0] != rows:
            raise ValueError(f"{name}: {x.shape[0]} rows, but cu_seqlens (the plan) ends at {rows}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}")
        if x.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: expected {q.shape[1]} heads as in q, got {x.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected width {q.shape[2]} a head as in q, got {k.shape[2]}")


def automatic_backend(q: Tensor, v: Tensor, plan: SequencePlan) -> str:
    """Packed kernels where they save padding and are there; slices of long sequences gain nothing from
    them.
    """
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if half and plan.map_q is not None and q.shape == v.shape and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        modern = torch.cuda.get_device_capability(q.device) >= (8, 0)
        if modern and torch_varlen() is not None:
            return "varlen"
    return "sdpa"


def torch_varlen() -> Callable[..., Any] | None:
    """torch's attention over packed sequences, where this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, scale: float) -> Tensor:
    """One scaled_dot_product_attention a bucket of the plan."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if plan.map_q is not None and plan.map_k is not None:
        if not needs_grad:
            return streamed_attention(q, k, v, plan, plan.map_q, plan.map_k, scale)
        q, k, v = pad_rows(q, plan.map_q), pad_rows(k, plan.map_k), pad_rows(v, plan.map_k)
    cuts_k = [(b.start_k, b.num * b.len_k) for b in plan.buckets]
    pieces_q = cut_rows(q, [(b.start_q, b.num * b.len_q) for b in plan.buckets])
    pieces_k, pieces_v = cut_rows(k, cuts_k), cut_rows(v, cuts_k)
    parts = []
    filled = 0
    for b, q_b, k_b, v_b in zip(plan.buckets, pieces_q, pieces_k, pieces_v, strict=True):
        if b.start_q > filled:  # slices only: queries without keys
            parts.append(q.new_zeros(b.start_q - filled, q.shape[1], v.shape[2]))
        parts.append(bucket_attention(q_b, k_b, v_b, b, scale))
        filled = b.start_q + b.num * b.len_q
    if q.shape[0] > filled or not parts:
        parts.append(q.new_zeros(q.shape[0] - filled, q.shape[1], v.shape[2]))
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result if plan.map_q is None else unpad_rows(result, plan.map_q)


def streamed_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, map_q: RowMap, map_k: RowMap, scale: float
) -> Tensor:
    """Without gradients a bucket is gathered, attended and put back while it is in the cache."""
    spare = q.shape[0]  # padding is written to one row too many
    out = (q.new_empty if map_q.complete else q.new_zeros)(spare + 1, q.shape[1], v.shape[2])
    for b in plan.buckets:
        slots = slice(b.start_q, b.start_q + b.num * b.len_q)
        rows_k = map_k.index[b.start_k : b.start_k + b.num * b.len_k]
        q_b = q.index_select(0, map_q.index[slots])
        k_b, v_b = k.index_select(0, rows_k), v.index_select(0, rows_k)
        attended = bucket_attention(q_b, k_b, v_b, b, scale)
        out.index_copy_(0, map_q.target[slots], attended.to(out.dtype))  # autocast chooses another
    return out[:spare]


def bucket_attention(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float) -> Tensor:
    """[num·len_q, H, D] × [num·len_k, H, D] → [num·len_q, H, Dv]."""
    q = q.unflatten(0, (bucket.num, bucket.len_q)).transpose(1, 2)
    k, v = (x.unflatten(0, (bucket.num, bucket.len_k)).transpose(1, 2) for x in (k, v))
    if q.is_cpu:
        out = attention_on_cpu(q, k, v, bucket.mask, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's, in float32 where it is less: forward and backward of 128 x 16 tokens take a third of the time so."""
    dtype = v.dtype
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).to(dtype)


def cut_rows(x: Tensor, cuts: list[tuple[int, int]]) -> list[Tensor]:
    """``x[start : start + size]`` of every (start, size), in increasing order.

    As one split, whose gradient is one concatenation; slices would each make a gradient as large as x.
    """
    sizes, wanted, filled = [], [], 0
    for start, size in cuts:
        if start > filled:
            sizes.append(start - filled)
        wanted.append(len(sizes))
        sizes.append(size)
        filled = start + size
    pieces = x.split([*sizes, x.shape[0] - filled])
    return [pieces[i] for i in wanted]


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, scale: float, backend: str
) -> Tensor:
    """One call of a kernel for packed sequences."""
    layout = plan.varlen
    kernel = {"varlen": torch_kernel, "xformers": xformers_kernel, "flash_attn": flash_kernel}[backend](q)
    num_rows = q.shape[0]
    if layout.rows_q is not None:
        q = q[layout.rows_q]
    if layout.rows_k is not None:
        k, v = k[layout.rows_k], v[layout.rows_k]
    if not layout.lengths_q:
        return q.new_zeros(num_rows, q.shape[1], v.shape[2])
    out = kernel(q, k, v, plan, scale)
    if layout.rows_q is None:
        return out
    return out.new_zeros(num_rows, *out.shape[1:]).index_copy(0, layout.rows_q, out)


Kernel = Callable[[Tensor, Tensor, Tensor, SequencePlan, float], Tensor]


def need_half_on_cuda(q: Tensor, backend: str) -> None:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"backend {backend!r} needs float16 or bfloat16 tensors on CUDA, got {q.dtype} on {q.device}; "
            "use backend='auto'"
        )


def torch_kernel(q: Tensor) -> Kernel:
    function = torch_varlen()
    if function is None:
        raise MissingDependencyError("torch.nn.attention.varlen", hint='pip install "torch>=2.10"')
    need_half_on_cuda(q, "varlen")

    takes_scale = "scale" in inspect.signature(function).parameters  # torch 2.10 has 1/√D only

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, scale: float) -> Tensor:
        s, usual = plan.varlen, q.shape[-1] ** -0.5
        options = {} if scale == usual else {"scale": scale}
        if options and not takes_scale:
            q, options = q * (scale / usual), {}
        out: Tensor = function(q, k, v, s.cu_q, s.cu_k, max(s.lengths_q), max(s.lengths_k), **options)
        return out

    return kernel


def flash_kernel(q: Tensor) -> Kernel:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        hint = "pip install flash-attn --no-build-isolation (or use backend='auto')"
        raise MissingDependencyError("flash-attn", hint=hint) from error
    need_half_on_cuda(q, "flash_attn")

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, scale: float) -> Tensor:
        s = plan.varlen
        out: Tensor = flash_attn_varlen_func(
            q, k, v, s.cu_q, s.cu_k, max(s.lengths_q), max(s.lengths_k), softmax_scale=scale
        )
        return out

    return kernel


def xformers_kernel(q: Tensor) -> Kernel:
    try:
        import xformers.ops as ops
    except ImportError as error:
        raise MissingDependencyError("xformers", "xformers") from error

    def kernel(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, scale: float) -> Tensor:
        s = plan.varlen
        bias = ops.fmha.BlockDiagonalMask.from_seqlens(list(s.lengths_q), list(s.lengths_k))
        out: Tensor = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[
            0
        ]
        return out

    return kernel


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, scale: float, hooks: AttentionHooks
) -> Tensor:
    """Sequence by sequence with explicit logits, for :class:`AttentionHooks`."""
    bad = [h for h in hooks.heads if not -q.shape[1] <= h < q.shape[1]]
    if bad:
        raise ValueError(f"hooks.heads: this attention has {q.shape[1]} heads, got {bad}")
    rows, parts = [], []
    for i in range(plan.num_sequences):
        rows_q, rows_k = plan.rows(i), plan.rows(i, keys=True)
        rows.append(rows_q)
        parts.append(exact_sequence(q[rows_q], k[rows_k], v[rows_k], i, scale, hooks))
    if not parts:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    out = torch.cat(parts)
    return out if plan.order is None else torch.empty_like(out).index_copy(0, torch.cat(rows), out)


def exact_sequence(q: Tensor, k: Tensor, v: Tensor, i: int, scale: float, hooks: AttentionHooks) -> Tensor:
    """[Lq, H, D] × [Lk, H, D] → [Lq, H, Dv], in chunks of queries so that memory stays bounded."""
    num_heads, len_q, len_k = q.shape[1], q.shape[0], k.shape[0]
    precise = torch.promote_types(q.dtype, torch.float32)
    factor = None if hooks.logit_scale is None else hooks.logit_scale(i)
    bias = None if hooks.logit_bias is None else hooks.logit_bias(i)
    for name, extra in (("logit_scale", factor), ("logit_bias", bias)):
        if extra is not None and not fits_logits(extra, (num_heads, len_q, len_k)):
            raise ValueError(
                f"hooks.{name}({i}): expected a tensor that broadcasts to [{num_heads}, {len_q}, {len_k}], "
                f"got {list(extra.shape)}"
            )
    outs, watched = [], []
    step = max(1, MAX_LOGITS // max(1, num_heads * len_k))
    for start in range(0, len_q, step):
        queries = slice(start, min(start + step, len_q))
        logits = scale * torch.einsum("qhd,khd->hqk", q[queries].to(precise), k.to(precise))
        if factor is not None:
            logits = logits * query_rows(factor, queries)
        if bias is not None:
            logits = logits + query_rows(bias, queries)
        probs = logits.softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", probs, v.to(precise)).to(q.dtype))
        if hooks.on_probs is not None:
            watched.append(probs[list(hooks.heads)])
    if hooks.on_probs is not None:
        hooks.on_probs(i, torch.cat(watched, 1) if watched else q.new_zeros(len(hooks.heads), len_q, len_k))
    return torch.cat(outs) if outs else q.new_zeros(0, num_heads, v.shape[2])


def fits_logits(extra: Tensor, shape: tuple[int, int, int]) -> bool:
    """Whether ``extra`` broadcasts to exactly ``shape`` [H, Lq, Lk]."""
    sizes = zip(reversed(extra.shape), reversed(shape), strict=False)
    return extra.ndim <= 3 and all(size in (1, want) for size, want in sizes)


def query_rows(extra: Tensor, queries: slice) -> Tensor:
    """The part of a hook's tensor (broadcasting to [H, Lq, Lk]) that belongs to a chunk of queries."""
    per_query = extra.ndim >= 2 and extra.shape[-2] > 1
    return extra[..., queries, :] if per_query else extra


def rms_norm_heads(x: Tensor, gamma: Tensor) -> Tensor:
    """TRELLIS's multi-head RMS norm of queries or keys: x / ‖x‖ · γ · √D in float32.

    x […, H, D], gamma [H, D].
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    normed = F.normalize(x.to(precise), dim=-1)
    return (normed * gamma.to(precise) * x.shape[-1] ** 0.5).to(x.dtype)


def rotary_tables(
    positions: Tensor, axis_dims: tuple[int, ...], theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D/2] of rotary embedding over A axes. positions [T, A]; D = Σ axis_dims, each
    even.

    Axis a turns its pair j by positions[:, a] · theta^(-2j / axis_dims[a]) (RoFormer, eq. 15, an axis at a
    time).
    """
    if positions.ndim != 2 or positions.shape[1] != len(axis_dims):
        raise ValueError(f"positions: expected [T, {len(axis_dims)}], got {list(positions.shape)}")
    if any(dim % 2 or dim < 0 for dim in axis_dims):
        raise ValueError(f"axis_dims: expected even numbers, got {axis_dims}")
    angles = []
    for axis, dim in enumerate(axis_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / max(dim, 1)
        frequencies = (theta**-exponents).to(positions.device, torch.float32)
        angles.append(positions[:, axis, None].to(torch.float32) * frequencies)
    table = torch.cat(angles, 1)
    return table.cos(), table.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs (x_2j, x_2j+1) of queries or keys. x [T, H, D], cos and sin [T, D/2]."""
    precise = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(precise).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].to(precise), sin[:, None].to(precise)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
