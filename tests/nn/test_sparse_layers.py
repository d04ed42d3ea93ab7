"""The layers over sparse plans: parameters, containers, and spconv as another backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diff2to3.errors import MissingDependencyError
from diff2to3.flow.config import LatentSMDiTConfig
from diff2to3.flow.smdit import LatentSMDiT
from diff2to3.kernels.sparse_conv import submanifold_conv
from diff2to3.nn.sparse_conv import PatchConv3d, SubmanifoldConv3d, UnpatchConv3d, neighbor_plan
from diff2to3.nn.sparse_patchify import SparseDownsample, SparseUpsample, patch_plan, patch_voxels
from diff2to3.types import SparseVoxels


@pytest.fixture
def voxels(generator: torch.Generator) -> SparseVoxels:
    coords = torch.nonzero(torch.rand(2, 9, 9, 9, generator=generator) < 0.2).int()
    return SparseVoxels.from_coords(coords, torch.randn(len(coords), 6, generator=generator), 9)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_parameters_have_the_public_layout() -> None:
    assert SubmanifoldConv3d(6, 4).weight.shape == (4, 3, 3, 3, 6)
    assert SubmanifoldConv3d(6, 4, "cross").weight.shape == (4, 7, 6)
    assert PatchConv3d(6, 4).weight.shape == UnpatchConv3d(6, 4).weight.shape == (4, 2, 2, 2, 6)
    assert SubmanifoldConv3d(6, 4, bias=False).bias is None
    layer = SubmanifoldConv3d(60, 4)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert 0.9 / (27 * 60) ** 0.5 < float(layer.weight.detach().abs().max()) <= 1 / (27 * 60) ** 0.5


def test_layers_go_down_and_up_again(voxels: SparseVoxels) -> None:
    neighbors, patches = neighbor_plan(voxels.coords), patch_plan(voxels.coords)
    hidden = SubmanifoldConv3d(6, 8)(voxels.feats, neighbors)
    coarse = patch_voxels(voxels, patches, PatchConv3d(8, 16)(hidden, patches))
    assert coarse.resolution == 5 and coarse.batch_size == 2
    coarse = coarse.with_feats(
        SubmanifoldConv3d(16, 16, "cross")(coarse.feats, neighbor_plan(coarse.coords, "cross"))
    )
    fine = UnpatchConv3d(16, 3)(coarse.feats, patches)
    assert fine.shape == (len(voxels), 3)
    pooled = SparseDownsample("sum")(voxels.feats, patches)
    assert pooled.shape == (patches.num_patches, 6)
    assert SparseUpsample()(pooled, patches).shape == (len(voxels), 6)


def test_models_change_resolution_with_these_layers() -> None:
    """Both on the way to SMDiT's tokens and back; they add nothing to the parameters' names."""
    network = LatentSMDiT(
        LatentSMDiTConfig(width=24, num_heads=2, num_double=1, num_single=1, io_channels=[8])
    )
    down = [m.reduce for m in network.input_blocks.modules() if isinstance(m, SparseDownsample)]
    up = [m for m in network.out_blocks.modules() if isinstance(m, SparseUpsample)]
    assert down == ["mean"] and len(up) == 1
    assert not any("resampler" in name for name in network.state_dict())


def test_patches_as_voxels(voxels: SparseVoxels) -> None:
    """Batch items without voxels keep their place in cu_seqlens."""
    last = SparseVoxels.from_coords(voxels.coords, voxels.feats, 9, batch_size=4)
    plan = patch_plan(last.coords)
    patches = patch_voxels(last, plan, SparseDownsample()(last.feats, plan))
    again = SparseVoxels.from_coords(patches.coords, patches.feats, patches.resolution, batch_size=4)
    assert torch.equal(patches.cu_seqlens, again.cu_seqlens) and patches.batch_size == 4


def test_unknown_names() -> None:
    for layer in (SubmanifoldConv3d, PatchConv3d):
        with pytest.raises(ValueError, match=r"^backend: expected one of"):
            layer(2, 2, backend="torchsparse")
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        PatchConv3d(2, 2, backend="spconv")
    with pytest.raises(ValueError, match=r"^kernel: expected"):
        SubmanifoldConv3d(2, 2, 4)
    with pytest.raises(ValueError, match=r"^reduce: expected"):
        SparseDownsample("max")


# ---- spconv ----


def test_missing_spconv_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "diff2to3\[spconv\]"'):
        SubmanifoldConv3d(2, 2, backend="spconv")


def layer_pair(cin: int, cout: int, kernel: int) -> tuple[SubmanifoldConv3d, SubmanifoldConv3d]:
    """The same layer with spconv and with the project's own kernels."""
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    theirs = SubmanifoldConv3d(cin, cout, kernel, backend="spconv")
    ours = SubmanifoldConv3d(cin, cout, kernel)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("cin, cout, kernel", [(6, 4, 3), (8, 128, 3), (64, 64, 3), (3, 9, 5)])
def test_spconv_gives_the_same(
    one_thread: None, cin: int, cout: int, kernel: int, voxels: SparseVoxels, generator: torch.Generator
) -> None:
    ours, theirs = layer_pair(cin, cout, kernel)
    plan = neighbor_plan(voxels.coords, kernel)
    feats = torch.randn(len(voxels), cin, generator=generator)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        torch.testing.assert_close(theirs(feats, plan), ours(feats, plan), rtol=1e-5, atol=1e-5)
        empty = neighbor_plan(voxels.coords[:0], kernel)
        assert theirs(feats[:0], empty).shape == (0, cout)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_spconv_refuses_what_it_cannot_do_on_a_cpu(one_thread: None, voxels: SparseVoxels) -> None:
    _, theirs = layer_pair(6, 4, 3)
    plan = neighbor_plan(voxels.coords)
    with pytest.raises(RuntimeError, match=r"no backward pass on a CPU; use torch.no_grad"):
        theirs(voxels.feats, plan)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="takes float32"):
            theirs.double()(voxels.feats.double(), plan)
        theirs.float()
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match=r"silently wrong .* call torch.set_num_threads\(1\)"):
            theirs(voxels.feats, plan)
        with pytest.raises(ValueError, match=r"^feats: expected"):
            theirs(voxels.feats[1:], plan)
    for kernel in ("cross", 1):
        with pytest.raises(ValueError, match=r"^backend: 'spconv' has no kernel"):
            SubmanifoldConv3d(2, 2, kernel, backend="spconv")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_matches_the_cpu(dtype: torch.dtype, voxels: SparseVoxels, generator: torch.Generator) -> None:
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        plan = neighbor_plan(voxels.coords.to(device))
        leaves = [t.to(device, dtype).requires_grad_() for t in (voxels.feats, weight, bias)]
        out = submanifold_conv(*leaves, plan)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    weight = torch.randn(20, 3, 3, 3, 6, generator=generator) / 12
    bias = torch.randn(20, generator=generator)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(run("cuda", dtype), run("cpu", torch.float64), strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
def test_cuda_plans_match_the_cpu(voxels: SparseVoxels, generator: torch.Generator) -> None:
    coords = voxels.coords[torch.randperm(len(voxels), generator=generator)]
    assert torch.equal(neighbor_plan(coords.cuda()).table.cpu(), neighbor_plan(coords).table)
    ours, cpu = patch_plan(coords.cuda()), patch_plan(coords)
    for name in ("coords", "children", "parents", "slots", "counts"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(cpu, name)), name
    with pytest.raises(ValueError, match="repeats voxel"):
        neighbor_plan(torch.cat([coords, coords[:1]]).cuda())
