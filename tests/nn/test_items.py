"""Sums over an item's thousands of rows in half precision: gradients of what time modulates, and means."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diff2to3.flow.blocks import BlockPlan, DoubleStreamBlock, Rows, SingleStreamBlock
from diff2to3.flow.smdit import ImagePool
from diff2to3.kernels.neighbors import neighbor_plan
from diff2to3.nn.items import mean_by_item, mean_row_by_item, spread_by_item, sum_by_item, sum_by_product
from diff2to3.nn.sequences import SequencePlan
from diff2to3.nn.sparse_blocks import SparseResBlock
from diff2to3.nn.streams import JointPlan
from diff2to3.nn.transformer import ModulatedCrossBlock, TransformerBlock

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, ITEMS, TOKENS = 16, 2, 6000


class AddsAsCuda(TorchDispatchMode):
    """Half-precision index_add rounds after every row, as atomic additions on CUDA do; on a CPU it need not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("index_add", "index_add_") and args[0].dtype in (torch.bfloat16, torch.float16):
            target, dim, index, source = args[:4]
            assert dim == 0
            out = target if name == "index_add_" else target.clone()
            return out.index_put_((index,), source, accumulate=True)
        return function(*args, **(kwargs or {}))


def double_block():
    block = DoubleStreamBlock(WIDTH, 1, 2.0)
    plan, both = block_plan()
    return block, lambda b, x, time: torch.cat(b(x[: both[0]], x[both[0] :], time, plan))


def single_block():
    plan, _ = block_plan()
    return SingleStreamBlock(WIDTH, 1, 2.0), lambda b, x, time: b(x, time, plan)


def shared_block():
    plan, _ = block_plan()
    block = SingleStreamBlock(WIDTH, 1, 2.0, share_modulation=True)
    return block, lambda b, x, time: b(x, time.repeat(1, 6), plan)


def block_plan():
    """5,000 voxel and 1,000 image tokens an item."""
    counts = (5000, 1000)
    joint = JointPlan.build(*(torch.arange(ITEMS + 1, dtype=torch.int32) * n for n in counts))
    items = torch.arange(ITEMS)
    voxels, image = (Rows(items.repeat_interleave(n)) for n in counts)
    return BlockPlan(joint, voxels, image, Rows(joint.batch_index), None), [n * ITEMS for n in counts]


def cross_block():
    self_plan = SequencePlan.from_lengths([TOKENS] * ITEMS)
    cross_plan = SequencePlan.from_lengths([TOKENS] * ITEMS, [5] * ITEMS)
    index = torch.arange(ITEMS).repeat_interleave(TOKENS)
    context = torch.randn(5 * ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))
    block = ModulatedCrossBlock(WIDTH, WIDTH, 1, 2.0)
    return block, lambda b, x, time: b(x, time, context.to(x.dtype), self_plan, cross_plan, index)


def convolution_block():
    axis = torch.arange(20)
    coords = torch.cartesian_prod(torch.arange(ITEMS), axis, axis, torch.arange(15)).to(torch.int32)
    plan = neighbor_plan(coords)
    block = SparseResBlock(WIDTH, WIDTH, WIDTH)
    return block, lambda b, x, time: b(x, plan, None, time, coords[:, 0].long())


def torso_block():
    plan = SequencePlan.from_lengths([TOKENS] * ITEMS)
    return TransformerBlock(WIDTH, 1, 2.0, qk_rms_norm=True), lambda b, x, time: b(x, plan)


def torso_convolution():
    _, call = convolution_block()
    return SparseResBlock(WIDTH, WIDTH), lambda b, x, time: call(b, x, None)


def image_pool():
    cu_seqlens = torch.arange(ITEMS + 1, dtype=torch.int32) * TOKENS
    return ImagePool(WIDTH), lambda b, x, time: b(x, cu_seqlens)


BLOCKS = [double_block, single_block, shared_block, cross_block, convolution_block]
BLOCKS += [torso_block, torso_convolution, image_pool]


@pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)
def test_gradients_of_long_items_in_bfloat16(make):
    """6,000 tokens an item: every parameter's gradient, and time's, are those of float64 but for roundings."""
    torch.manual_seed(0)
    block, call = make()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, time = torch.randn(ITEMS * TOKENS, WIDTH), torch.randn(ITEMS, WIDTH)
    target = 1 + torch.randn(ITEMS * TOKENS, WIDTH)

    def gradients(dtype, autocast):
        block.to(dtype)
        leaf = time.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(block, x.to(dtype), leaf)
        inputs = {"time": leaf, **dict(block.named_parameters())}
        loss = (out * target[: len(out)].to(out.dtype)).sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {name: grad.double() for name, grad in zip(inputs, grads, strict=True) if grad is not None}

    exact = gradients(torch.float64, False)
    with AddsAsCuda():
        half = gradients(torch.float32, True)
    errors = {name: float((half[name] - g).norm() / g.norm()) for name, g in exact.items()}
    assert len(errors) > 2 and max(errors.values()) < 0.04, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sums", [None, sum_by_product])
def test_sums_and_spread_match_float64(dtype, sums, monkeypatch):
    """Both ways of adding: 0 for an item without rows, and rows in any order."""
    if sums is not None:
        monkeypatch.setattr("diff2to3.nn.items.sum_in_order", sums)
    torch.manual_seed(0)
    lengths = [3000, 0, 1, 2499]
    index = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    index = index[torch.randperm(len(index))]
    rows = (1 + torch.randn(len(index), 5)).to(dtype).requires_grad_()
    result = sum_by_item(rows, index, 4)
    expected = torch.stack([rows.detach()[index == i].double().sum(0) for i in range(4)])
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(result.double(), expected, rtol=tight, atol=tight)
    weights = torch.randn(4, 5).to(result.dtype)
    (v_rows,) = torch.autograd.grad(result, rows, weights)
    torch.testing.assert_close(v_rows, weights[index].to(dtype))

    values = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    spread = spread_by_item(values, index)
    torch.testing.assert_close(spread, values[index])
    (v_values,) = torch.autograd.grad(spread, values, rows.detach())
    torch.testing.assert_close(
        v_values, expected.to(dtype), rtol=2**-8 if dtype == torch.bfloat16 else tight, atol=tight
    )


def test_gradients_of_gradients():
    index = torch.tensor([0, 0, 2, 1, 2])
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: spread_by_item(v, index) ** 2, values)
    assert torch.autograd.gradgradcheck(lambda r: sum_by_item(r, index, 3) ** 2, rows)


def test_means_of_long_items():
    """bfloat16 rows: the mean over 6,000 is that of float64, rounded once."""
    torch.manual_seed(0)
    rows = (1 + torch.randn(6003, 4)).bfloat16()
    cu_seqlens = torch.tensor([0, 6000, 6000, 6003], dtype=torch.int32)
    with AddsAsCuda():
        result = mean_row_by_item(rows, cu_seqlens)
    expected = torch.stack(
        [rows[:6000].double().mean(0), torch.zeros(4).double(), rows[6000:].double().mean(0)]
    )
    torch.testing.assert_close(result, expected.bfloat16())
    exact = mean_by_item(rows.double(), cu_seqlens)
    torch.testing.assert_close(exact, expected.mean(1))


def test_rows_of_a_single_item_are_not_spread():
    values = torch.randn(1, 3)
    assert spread_by_item(values, None) is values
    assert dataclasses.replace(Rows(None)).spread(values) is values


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_on_cuda_are_exact_and_repeat(dtype):
    torch.manual_seed(0)
    index = torch.arange(8, device="cuda").repeat_interleave(6000)
    rows = (1 + torch.randn(48000, 64, device="cuda")).to(dtype)
    first = sum_by_item(rows, index, 8)
    assert first.dtype == torch.float32
    expected = rows.double().view(8, 6000, 64).sum(1)
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-2)
    for _ in range(5):
        assert torch.equal(first, sum_by_item(rows, index, 8))
