"""Attention over packed sequences, against brute force in float64, one sequence at a time."""

import itertools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.errors import MissingDependencyError
from diff2to3.nn import attention as attention_module
from diff2to3.nn import sequences as sequences_module
from diff2to3.nn.attention import AttentionHooks, apply_rotary, attention, rms_norm_heads, rotary_tables
from diff2to3.nn.sequences import SequencePlan
from diff2to3.nn.streams import JointPlan, pack_streams, unpack_streams
from diff2to3.nn.windows import WindowPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(q, k, v, groups_q, groups_k, scale=None, factors=None, biases=None):
    """One sequence (a list of query rows, a list of key rows) and one head at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    for i, (rows_q, rows_k) in enumerate(zip(groups_q, groups_k, strict=True)):
        for head in range(q.shape[1]):
            for row in rows_q:
                if len(rows_k) == 0:
                    continue
                logits = torch.stack([(q[row, head] * k[r, head]).sum() * scale for r in rows_k])
                if factors is not None:
                    logits = logits * factors[i][head, rows_q.index(row)]
                if biases is not None:
                    logits = logits + biases[i][head, rows_q.index(row)]
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                out[row, head] = sum(w * v[r, head] for w, r in zip(weights, rows_k, strict=True))
    return out


def packed(lengths):
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    return torch.tensor(bounds, dtype=torch.int32), [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


def random_qkv(num_q, num_k, heads=2, width=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_q, heads, width, generator=g, dtype=dtype),
        torch.randn(num_k, heads, width, generator=g, dtype=dtype),
        torch.randn(num_k, heads, width, generator=g, dtype=dtype),
    )


def check_with_gradients(run, reference, inputs, tolerance=1e-12):
    """Compare a function, with and without gradients, and its gradients with a reference, all in float64."""
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), reference(*inputs), rtol=0, atol=tolerance)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    out, expected = run(*ours), reference(*theirs)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    v_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    nothing = (None,) * len(inputs)  # without any sequence the outputs are constants
    grads = torch.autograd.grad(out, ours, v_out, allow_unused=True) if out.requires_grad else nothing
    expected_grads = (
        torch.autograd.grad(expected, theirs, v_out, allow_unused=True) if expected.requires_grad else nothing
    )
    for grad, other, x in zip(grads, expected_grads, ours, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(
            zero if grad is None else grad, zero if other is None else other, rtol=0, atol=tolerance
        )


lengths_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.sampled_from([0.0, 4.0, 1e9]))
def test_self_attention_matches_brute_force(lengths, call_cost):
    """Whatever the bucketing: every call alone (cost 0), the default, or all in one bucket (huge cost)."""
    cu, groups = packed(lengths)
    inputs = random_qkv(sum(lengths), sum(lengths))
    saved = dict(sequences_module.CALL_COST)
    try:
        sequences_module.CALL_COST["cpu"] = call_cost
        plan = SequencePlan.from_cu_seqlens(cu)
    finally:
        sequences_module.CALL_COST.update(saved)
    if call_cost == 1e9:
        assert len(plan.buckets) <= 1
    check_with_gradients(
        lambda q, k, v: attention(q, k, v, plan),
        lambda q, k, v: brute_force(q, k, v, groups, groups),
        inputs,
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), min_size=1, max_size=6), st.booleans())
def test_cross_attention_matches_brute_force(pairs, one_bucket):
    cu_q, groups_q = packed([a for a, _ in pairs])
    cu_k, groups_k = packed([b for _, b in pairs])
    inputs = random_qkv(int(cu_q[-1]), int(cu_k[-1]))
    saved = dict(sequences_module.CALL_COST)
    try:
        sequences_module.CALL_COST["cpu"] = 1e9 if one_bucket else 0.0
        plan = SequencePlan.from_cu_seqlens(cu_q, cu_k)
    finally:
        sequences_module.CALL_COST.update(saved)
    check_with_gradients(
        lambda q, k, v: attention(q, k, v, plan, scale=0.7),
        lambda q, k, v: brute_force(q, k, v, groups_q, groups_k, scale=0.7),
        inputs,
    )


@pytest.mark.parametrize("shift", [0, 2, (1, 0, 3), -3])
@pytest.mark.parametrize("window", [4, (2, 3, 5)])
def test_windows_match_direct_grouping(window, shift):
    """Rows in any order; groups by floor((coord + shift) / window) and batch, found with a dictionary."""
    g = torch.Generator().manual_seed(1)
    cells = torch.randperm(2 * 10**3, generator=g)[:90]
    coords = torch.stack([cells // 1000, cells // 100 % 10, cells // 10 % 10, cells % 10], 1).to(torch.int32)
    size = (window,) * 3 if isinstance(window, int) else window
    moved = (shift,) * 3 if isinstance(shift, int) else shift
    groups = {}
    for row, (b, *xyz) in enumerate(coords.tolist()):
        key = (b, *((c + s) // w for c, s, w in zip(xyz, moved, size, strict=True)))
        groups.setdefault(key, []).append(row)
    rows = [groups[key] for key in sorted(groups)]

    plan = WindowPlan.build(coords, window, shift)
    assert [plan.sequences.rows(i).tolist() for i in range(plan.sequences.num_sequences)] == rows
    check_with_gradients(
        lambda q, k, v: attention(q, k, v, plan),
        lambda q, k, v: brute_force(q, k, v, rows, rows),
        random_qkv(90, 90),
    )


def test_window_attention_is_equivariant_to_row_permutations():
    g = torch.Generator().manual_seed(2)
    cells = torch.randperm(16**3, generator=g)[:700]
    coords = torch.stack([0 * cells, cells // 256, cells // 16 % 16, cells % 16], 1).to(torch.int32)
    q, k, v = random_qkv(700, 700)
    shuffle = torch.randperm(700, generator=g)
    straight = attention(q, k, v, WindowPlan.build(coords, 8, 4))
    shuffled = attention(q[shuffle], k[shuffle], v[shuffle], WindowPlan.build(coords[shuffle], 8, 4))
    torch.testing.assert_close(shuffled, straight[shuffle], rtol=0, atol=1e-12)


def test_batching_changes_nothing():
    """An item alone and among others, in float32, whatever the others' lengths are."""
    lengths = [33, 1, 50, 0, 51]
    cu, groups = packed(lengths)
    q, k, v = random_qkv(sum(lengths), sum(lengths), heads=3, width=8, dtype=torch.float32)
    together = attention(q, k, v, cu)
    for rows in groups:
        alone = attention(q[rows], k[rows], v[rows], torch.tensor([0, len(rows)]))
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=2e-6)


def test_length_one_returns_the_value_and_empty_inputs_stay_empty():
    q, k, v = random_qkv(4, 4)
    assert torch.equal(attention(q, k, v, torch.arange(5)), v)
    nothing = torch.zeros(0, 2, 4)
    for cu in ([0], [0, 0], [0, 0, 0]):
        assert attention(nothing, nothing, nothing, torch.tensor(cu)).shape == (0, 2, 4)
    coords = torch.zeros(0, 4, dtype=torch.int32)
    assert attention(nothing, nothing, nothing, WindowPlan.build(coords, 8)).shape == (0, 2, 4)


def test_nan_in_one_sequence_stays_there():
    lengths = [3, 5, 4, 30]
    cu, groups = packed(lengths)
    q, k, v = random_qkv(sum(lengths), sum(lengths))
    for x in (q, k, v):
        x[groups[1]] = float("nan")
    plan = SequencePlan.from_cu_seqlens(cu)
    assert plan.map_q is not None  # otherwise nothing is padded, and nothing is tested
    out = attention(q, k, v, plan)
    assert torch.isnan(out[groups[1]]).all()
    assert torch.isfinite(out[groups[0] + groups[2] + groups[3]]).all()


def test_extreme_logits_give_no_nan():
    q, k, v = random_qkv(20, 20, dtype=torch.float32)
    q, k = (1e4 * q).requires_grad_(), (1e4 * k).requires_grad_()
    out = attention(q, k, v, torch.tensor([0, 7, 20]))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()


def test_long_sequences_are_slices_without_padding():
    plan = SequencePlan.from_lengths([1500, 1499, 1500])
    assert plan.map_q is None and plan.map_k is None and plan.padding == 0 and len(plan.buckets) == 3
    dense = SequencePlan.from_lengths([77] * 8, [21] * 8)
    assert dense.map_q is None and len(dense.buckets) == 1


def test_twenty_thousand_voxels_are_a_handful_of_calls():
    g = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=g), dim=1)
    bumps = 0.43 + 0.05 * torch.sin(25 * directions).prod(1, keepdim=True)
    cells = torch.unique(((directions * bumps + 0.5) * 64).long(), dim=0)
    coords = torch.nn.functional.pad(cells, (1, 0)).to(torch.int32)
    assert len(coords) > 15_000
    for window, limit in ((8, 16), (4, 16)):
        for shift in (0, window // 2):
            plan = WindowPlan.build(coords, window, shift).sequences
            assert len(plan.buckets) <= limit < plan.num_sequences / 10
            assert plan.padding < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_the_dtype(dtype):
    lengths = [40, 3, 17, 64]
    cu, _ = packed(lengths)
    exact = random_qkv(sum(lengths), sum(lengths), heads=2, width=16)
    half = [x.to(dtype) for x in exact]
    expected = attention(*(x.double() for x in half), cu)
    out = attention(*half, cu)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


# ---------------------------------------------------------------- joint streams


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5))
def test_joint_attention_matches_brute_force(pairs):
    cu_a, groups_a = packed([a for a, _ in pairs])
    cu_b, groups_b = packed([b for _, b in pairs])
    num_a, num_b = int(cu_a[-1]), int(cu_b[-1])
    plan = JointPlan.build(cu_a, cu_b)
    q, k, v = random_qkv(num_a + num_b, num_a + num_b)
    rows = [ga + [num_a + r for r in gb] for ga, gb in zip(groups_a, groups_b, strict=True)]

    def run(q, k, v):
        stacked = [pack_streams(x[:num_a], x[num_a:], plan) for x in (q, k, v)]
        return torch.cat(unpack_streams(attention(*stacked, plan), plan))

    check_with_gradients(run, lambda q, k, v: brute_force(q, k, v, rows, rows), (q, k, v))
    items = pack_streams(
        torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([a for a, _ in pairs])),
        torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([b for _, b in pairs])),
        plan,
    )
    assert torch.equal(items, plan.batch_index)


def test_streams_refuse_what_does_not_fit():
    plan = JointPlan.build(torch.tensor([0, 3, 5]), torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="a, b: expected 5 and 4 rows"):
        pack_streams(torch.zeros(4, 2), torch.zeros(4, 2), plan)
    with pytest.raises(ValueError, match="packed: expected 9 rows"):
        unpack_streams(torch.zeros(8, 2), plan)
    with pytest.raises(ValueError, match="cu_seqlens_b"):
        JointPlan.build(torch.tensor([0, 3, 5]), torch.tensor([0, 2]))


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize("max_logits", [1 << 24, 24])
def test_hooks_scale_and_bias_logits_and_report_probabilities(max_logits, monkeypatch):
    """Also when the queries are taken in chunks; and a tensor may broadcast over heads or queries."""
    monkeypatch.setattr(attention_module, "MAX_LOGITS", max_logits)
    lengths_q, lengths_k = [5, 0, 7], [4, 3, 6]
    cu_q, groups_q = packed(lengths_q)
    cu_k, groups_k = packed(lengths_k)
    g = torch.Generator().manual_seed(5)
    shapes = [(2, a, b) for a, b in zip(lengths_q, lengths_k, strict=True)]
    factors = [torch.rand(s, generator=g, dtype=torch.float64) + 0.5 for s in shapes]
    biases = [torch.randn(s[2], generator=g, dtype=torch.float64) for s in shapes]
    full_biases = [b.expand(s) for b, s in zip(biases, shapes, strict=True)]
    seen = {}
    hooks = AttentionHooks(factors.__getitem__, biases.__getitem__, heads=(1,), on_probs=seen.__setitem__)
    plan = SequencePlan.from_cu_seqlens(cu_q, cu_k)
    inputs = random_qkv(12, 13)
    check_with_gradients(
        lambda q, k, v: attention(q, k, v, plan, hooks=hooks),
        lambda q, k, v: brute_force(q, k, v, groups_q, groups_k, factors=factors, biases=full_biases),
        inputs,
    )
    q, k, _ = inputs
    for i in range(3):
        logits = torch.einsum("qd,kd->qk", q[groups_q[i], 1], k[groups_k[i], 1]) / 2
        expected = (logits * factors[i][1] + biases[i]).softmax(-1)
        torch.testing.assert_close(seen[i], expected[None])


def test_hooks_without_changes_equal_the_fast_path_on_windows():
    g = torch.Generator().manual_seed(6)
    cells = torch.randperm(8**3, generator=g)[:200]
    coords = torch.stack([0 * cells, cells // 64, cells // 8 % 8, cells % 8], 1).to(torch.int32)
    plan = WindowPlan.build(coords, 4, 2)
    q, k, v = random_qkv(200, 200)
    out = attention(q, k, v, plan, hooks=AttentionHooks())
    torch.testing.assert_close(out, attention(q, k, v, plan), rtol=0, atol=1e-12)


def test_bias_takes_gradients():
    bias = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    q, k, v = random_qkv(3, 3)

    def run(bias):
        return attention(q, k, v, torch.tensor([0, 3]), hooks=AttentionHooks(logit_bias=lambda i: bias))

    assert torch.autograd.gradcheck(run, (bias,))


def test_hooks_refuse_what_does_not_fit():
    q, k, v = random_qkv(3, 3)
    cu = torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"hooks.heads: this attention has 2 heads, got \[2\]"):
        attention(q, k, v, cu, hooks=AttentionHooks(heads=(2,)))
    with pytest.raises(ValueError, match=r"hooks.logit_bias\(0\).*\[2, 3, 3\]"):
        attention(q, k, v, cu, hooks=AttentionHooks(logit_bias=lambda i: torch.zeros(4)))
    with pytest.raises(ValueError, match=r"hooks.logit_scale\(0\)"):
        attention(q, k, v, cu, hooks=AttentionHooks(logit_scale=lambda i: torch.zeros(5, 2, 3, 3)))


# ---------------------------------------------------------------- bad input and other backends


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 3]), "cu_seqlens .* ends at 3"),
        (torch.tensor([1, 4]), "start with 0"),
        (torch.tensor([0, 3, 2, 4]), "non-decreasing"),
        (torch.tensor([[0, 4]]), r"\[S \+ 1\]"),
        (torch.tensor([0.0, 4.0]), "int32 or int64"),
        (torch.zeros(0, dtype=torch.int64), r"\[S \+ 1\]"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, message):
    q, k, v = random_qkv(4, 4)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, cu_seqlens)


def test_bad_shapes_and_names():
    q, k, v = random_qkv(4, 4)
    cu = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        SequencePlan.from_cu_seqlens(cu, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=r"q: expected \[T, H, D\]"):
        attention(q[0], k, v, cu)
    with pytest.raises(ValueError, match=r"k: expected torch\.float64"):
        attention(q, k.float(), v, cu)
    with pytest.raises(ValueError, match="v: expected 2 heads"):
        attention(q, k, v[:, :1], cu)
    with pytest.raises(ValueError, match="k: expected width 4"):
        attention(q, k[..., :2], v, cu)
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .* got 'spda'"):
        attention(q, k, v, cu, backend="spda")
    with pytest.raises(ValueError, match="window: expected positive"):
        WindowPlan.build(torch.zeros(1, 4, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="coords"):
        WindowPlan.build(torch.zeros(1, 3, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="64-bit"):
        far = torch.tensor([[0, 0, 0, 0], [2**30, 2**30, 2**30, 2**30]], dtype=torch.int32)
        WindowPlan.build(far, 1)


def test_missing_libraries_name_the_fix(monkeypatch):
    q, k, v = random_qkv(4, 4)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*diff2to3\[xformers\]"):
        attention(q, k, v, torch.tensor([0, 4]), backend="xformers")
    with pytest.raises(MissingDependencyError, match="pip install flash-attn"):
        attention(q, k, v, torch.tensor([0, 4]), backend="flash_attn")


def test_packed_kernels_get_their_sequences(monkeypatch):
    """The calls made to xformers, checked with a stand-in of its signature: order, lengths, the way back."""

    def block_diagonal(q, k, v, attn_bias, scale):
        lengths_q, lengths_k = attn_bias
        assert min(lengths_q + lengths_k) > 0  # empty sequences are dropped before the kernel
        _, groups_q = packed(lengths_q)
        _, groups_k = packed(lengths_k)
        return brute_force(q[0], k[0], v[0], groups_q, groups_k, scale=scale)[None]

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = block_diagonal
    ops.fmha = types.SimpleNamespace(
        BlockDiagonalMask=types.SimpleNamespace(from_seqlens=lambda a, b: (a, b))
    )
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)

    coords = torch.tensor([[0, x * 5 % 12, x * 7 % 12, 0] for x in range(12)], dtype=torch.int32)
    plans = [
        (WindowPlan.build(coords, 4, 2), 12, 12),
        (SequencePlan.from_lengths([3, 0, 4, 5], [2, 5, 0, 6]), 12, 13),
        (SequencePlan.from_lengths([0, 0], [2, 0]), 0, 2),
    ]
    for plan, num_q, num_k in plans:
        check_with_gradients(
            lambda q, k, v, plan=plan: attention(q, k, v, plan, backend="xformers"),
            lambda q, k, v, plan=plan: attention(q, k, v, plan, backend="sdpa"),
            random_qkv(num_q, num_k),
        )


def varlen_of_torch(takes_scale):
    """torch.nn.attention.varlen.varlen_attn as torch 2.10 has it, and with the scale of later ones."""

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
        bounds = zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_seq_q, cu_seq_k)), strict=True)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        parts = []
        for (q0, q1), (k0, k1) in bounds:
            assert q1 - q0 <= max_q and k1 - k0 <= max_k
            logits = scale * torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1])
            parts.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[k0:k1]))
        return torch.cat(parts)

    return new if takes_scale else old


@pytest.mark.parametrize("takes_scale", [False, True])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_varlen_of_every_torch(takes_scale, scale, monkeypatch):
    """torch 2.10's has no ``scale``; queries are scaled instead."""
    monkeypatch.setattr(attention_module, "torch_varlen", lambda: varlen_of_torch(takes_scale))
    monkeypatch.setattr(attention_module, "need_half_on_cuda", lambda q, backend: None)
    plan = SequencePlan.from_lengths([3, 4, 5], [2, 5, 6])
    check_with_gradients(
        lambda q, k, v: attention(q, k, v, plan, scale=scale, backend="varlen"),
        lambda q, k, v: attention(q, k, v, plan, scale=scale, backend="sdpa"),
        random_qkv(12, 13),
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "varlen"])
def test_cuda_backends_match_float64(backend):
    g = torch.Generator().manual_seed(8)
    cells = torch.randperm(16**3, generator=g)[:900]
    coords = torch.stack([0 * cells, cells // 256, cells // 16 % 16, cells % 16], 1).to(torch.int32)
    q, k, v = (x.bfloat16() for x in random_qkv(900, 900, heads=4, width=64))
    expected = attention(q.double(), k.double(), v.double(), WindowPlan.build(coords, 8, 4))
    q, k, v = (x.cuda().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, WindowPlan.build(coords.cuda(), 8, 4), backend=backend)
    assert (out.double().cpu() - expected).abs().max() <= 0.02 * expected.abs().max()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


# ---------------------------------------------------------------- norms and rotations


def test_rms_norm_of_heads_matches_its_definition():
    g = torch.Generator().manual_seed(9)
    x, gamma = torch.randn(5, 3, 8, generator=g, dtype=torch.float64), torch.rand(3, 8, generator=g)
    expected = torch.empty_like(x)
    for t in range(5):
        for h in range(3):
            expected[t, h] = x[t, h] / x[t, h].pow(2).sum().sqrt() * gamma[h].double() * 8**0.5
    torch.testing.assert_close(rms_norm_heads(x, gamma.double()), expected)
    assert rms_norm_heads(x.bfloat16(), gamma).dtype == torch.bfloat16
    assert torch.equal(rms_norm_heads(torch.zeros(1, 3, 8), gamma), torch.zeros(1, 3, 8))


def test_rotary_is_a_rotation_that_depends_on_relative_position_only():
    dims = (6, 4, 6)
    g = torch.Generator().manual_seed(10)
    x, y = (torch.randn(1, 2, 16, generator=g, dtype=torch.float64) for _ in range(2))
    p, r = torch.tensor([[3, 5, 2]]), torch.tensor([[1, 0, 7]])

    def dot(a, b):
        return (apply_rotary(x, *rotary_tables(a, dims)) * apply_rotary(y, *rotary_tables(b, dims))).sum(-1)

    offset = torch.tensor([[4, 1, 2]])
    torch.testing.assert_close(dot(p, r), dot(p + offset, r + offset), rtol=0, atol=1e-5)
    assert (dot(p, r) - dot(p + offset, r)).abs().min() > 1e-3
    turned = apply_rotary(x, *rotary_tables(p, dims))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-6)

    # by complex numbers, pair by pair
    angles = [3 * 10000 ** (-2 * j / 6) for j in range(3)] + [5.0, 5 * 0.01]
    angles += [2 * 10000 ** (-2 * j / 6) for j in range(3)]
    pairs = torch.view_as_complex(x.reshape(1, 2, 8, 2))
    expected = pairs * torch.polar(
        torch.ones(8, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64)
    )
    torch.testing.assert_close(turned, torch.view_as_real(expected).reshape(1, 2, 16), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="positions"):
        rotary_tables(torch.zeros(4, 2), dims)
    with pytest.raises(ValueError, match="axis_dims"):
        rotary_tables(torch.zeros(4, 3), (3, 3, 2))
