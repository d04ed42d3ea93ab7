"""Sparse patchify: voxels grouped into p³ patches, the rows of a patch reduced to one, and the inverse.

    plan = patch_plan(coords, patch_size=2)     once for a set of voxels
    patchify(feats, plan, "mean")               [N, C] -> [M, C]
    unpatchify(patch_feats, plan)               [M, C] -> [N, C]

The weighted reduction (a strided sparse convolution) and its transpose are in sparse_conv.py. Plain PyTorch
versions are the branches for ``reference``; C++: csrc/cpu/sparse_maps.cpp, sparse_patch.cpp; CUDA:
csrc/cuda/sparse_maps.cu, sparse_gather.cu.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .library import call, define_op, resolve_backend
from .neighbors import check_coords, new_status, raise_bad, sorted_keys

MAX_PATCH_SIZE = 32
REDUCTIONS = ("mean", "sum", "mean_with_zero")
HALF_TYPES = (torch.float16, torch.bfloat16)
FLOAT_TYPES = (torch.float32, torch.float64, *HALF_TYPES)


@dataclass(frozen=True)
class PatchPlan:
    """N voxels grouped into M patches of p³ cells; built once and handed to every layer.

    coords      int32 [M, 4]   (batch, x, y, z) of the patches that hold a voxel: voxel coordinates divided
                               by p, ascending (batch slowest, z fastest)
    children    int32 [p³, M]  row of the voxel at a slot of a patch, or -1. Slot of (x, y, z) in its patch:
                               (x mod p) p² + (y mod p) p + z mod p
    parents     int32 [N]      row of the patch that holds a voxel
    slots       int32 [N]      the slot it holds there
    counts      int32 [M]      number of voxels in a patch
    patch_size  p
    """

    coords: Tensor
    children: Tensor
    parents: Tensor
    slots: Tensor
    counts: Tensor
    patch_size: int

    def to(self, device: torch.device | str) -> PatchPlan:
        """The same plan on ``device``."""
        return PatchPlan(
            self.coords.to(device),
            self.children.to(device),
            self.parents.to(device),
            self.slots.to(device),
            self.counts.to(device),
            self.patch_size,
        )

    @property
    def num_voxels(self) -> int:
        return int(self.parents.shape[0])

    @property
    def num_patches(self) -> int:
        return int(self.coords.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.children.shape[0])


def patch_plan(coords: Tensor, patch_size: int = 2, *, backend: str = "auto") -> PatchPlan:
    """Group voxels into patches of ``patch_size``³ cells.

    Args:
        coords: int32 or int64 [N, 4] (batch, x, y, z) in any order; N may be 0. Limits as in
            :func:`~.neighbors.neighbor_plan`.
        patch_size: 1 to 32.

    Raises:
        ValueError: wrong shape or dtype, a coordinate outside the limits, or a voxel that occurs twice.
    """
    coords = check_coords(coords)
    if not isinstance(patch_size, int) or not 1 <= patch_size <= MAX_PATCH_SIZE:
        raise ValueError(
            f"patch_size: expected a whole number from 1 to {MAX_PATCH_SIZE}, got {patch_size!r}"
        )
    chosen = resolve_backend(backend, coords.device, torch.float32)
    patch_coords, children, parents, slots = patch_tables(coords, patch_size, chosen)
    counts = (children >= 0).sum(0, dtype=torch.int32)
    return PatchPlan(patch_coords, children, parents, slots, counts, patch_size)


def patchify(feats: Tensor, plan: PatchPlan, reduce: str = "mean", *, backend: str = "auto") -> Tensor:
    """Reduce the voxels of every patch to one row: [N, C] -> [M, C]. Differentiable.

    ``reduce``: ``mean`` and ``sum`` over the active voxels of a patch, or ``mean_with_zero``, which counts
    one more row of zeros: sum / (count + 1). That is what TRELLIS's SparseDownsample computes (its
    scatter_reduce includes the zeros it starts from), so its weights need it.
    """
    check_feats("feats", feats, plan.num_voxels, plan.coords.device)
    scale = reduction_scale(plan, reduce, feats)
    return patch_sum(feats, plan.children, plan.parents, scale, choose(backend, feats))


def unpatchify(feats: Tensor, plan: PatchPlan, *, backend: str = "auto") -> Tensor:
    """Give every voxel the row of its patch: [M, C] -> [N, C]. Differentiable."""
    check_feats("feats", feats, plan.num_patches, plan.coords.device)
    return patch_copy(feats, plan.children, plan.parents, None, choose(backend, feats))


def reduction_scale(plan: PatchPlan, reduce: str, like: Tensor) -> Tensor | None:
    """What the sum over a patch is multiplied with: [M], or None for 1."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if reduce == "sum":
        return None
    counts = plan.counts + 1 if reduce == "mean_with_zero" else plan.counts
    return counts.to(like.dtype if like.dtype == torch.float64 else torch.float32).reciprocal()


def check_feats(name: str, feats: Tensor, num_rows: int, device: torch.device) -> None:
    """ValueError unless ``feats`` are features for a plan of ``num_rows`` rows on ``device``."""
    if feats.ndim != 2 or feats.shape[0] != num_rows:
        raise ValueError(
            f"{name}: expected shape [{num_rows}, channels] to match the plan, got {list(feats.shape)}"
        )
    if feats.dtype not in FLOAT_TYPES:
        raise ValueError(f"{name}: expected float32, float64, float16 or bfloat16, got {feats.dtype}")
    if feats.device != device:
        raise ValueError(
            f"{name}: on {feats.device}, but the plan is on {device}; move one of them with .to()"
        )


def choose(backend: str, feats: Tensor) -> str:
    """The backend for features of any floating-point type: kernels compute half types in float32."""
    return resolve_backend(backend, feats.device, torch.float32)


# ---- grouping ----


@define_op("patch_tables", "(Tensor coords, int patch_size, str backend) -> (Tensor, Tensor, Tensor, Tensor)")
def patch_tables(coords: Tensor, patch_size: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``coords``, ``children``, ``parents`` and ``slots`` of a :class:`PatchPlan`."""
    status, num_voxels = new_status(coords), len(coords)
    keys, order = sorted_keys(coords, patch_size, status, backend)
    raise_bad(coords, status)
    starts = torch.ones_like(keys, dtype=torch.bool)  # of a patch, in sorted order
    torch.ne(keys[1:], keys[:-1], out=starts[1:])
    group = starts.cumsum(0, dtype=torch.int32) - 1
    num_patches = int(group[-1]) + 1 if num_voxels else 0
    children = torch.full((patch_size**3, num_patches), -1, dtype=torch.int32, device=coords.device)
    parents, slots = torch.empty_like(order), torch.empty_like(order)
    if backend == "reference":
        parents[order.long()] = group
        local = coords[:, 1:] % patch_size
        slots.copy_((local[:, 0] * patch_size + local[:, 1]) * patch_size + local[:, 2])
        rows = torch.arange(num_voxels, dtype=torch.int32, device=coords.device)
        cells = slots.long() * num_patches + parents.long()
        children.view(-1).scatter_reduce_(0, cells, rows, "amin", include_self=False)
        again = children.view(-1)[cells] != rows  # a voxel whose place an earlier row has
        status[1] = torch.cat([rows[again].long(), status[1:]]).min()
        patch_coords = torch.cat([coords[:, :1], coords[:, 1:] // patch_size], 1)[order.long()[starts]]
    else:
        patch_coords = coords.new_empty((num_patches, 4))
        call(
            "patch_tables", coords, order, group, patch_coords, children, parents, slots, status, num_voxels,
            num_patches, patch_size, device=coords.device,
        )  # fmt: skip
    raise_bad(coords, status)
    return patch_coords, children, parents, slots


@torch.library.register_fake("diff2to3::patch_tables")
def _(coords: Tensor, patch_size: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_patches = torch.library.get_ctx().new_dynamic_size()
    patch_coords, children = (
        coords.new_empty((num_patches, 4)),
        coords.new_empty((patch_size**3, num_patches)),
    )
    return patch_coords, children, coords.new_empty(coords.shape[0]), coords.new_empty(coords.shape[0])


# ---- sums and copies: each is the other's gradient ----

ROWS_SCHEMA = "(Tensor feats, Tensor children, Tensor parents, Tensor? scale, str backend) -> Tensor"


@define_op("patch_sum", ROWS_SCHEMA)
def patch_sum(feats: Tensor, children: Tensor, parents: Tensor, scale: Tensor | None, backend: str) -> Tensor:
    """scale[m] · Σ_slot feats[children[slot, m]]: [N, C] -> [M, C]."""
    if feats.dtype in HALF_TYPES:
        return patch_sum(feats.float(), children, parents, scale, backend).to(feats.dtype)
    num_slots, num_patches = children.shape
    if backend == "reference":
        out = feats.new_zeros(num_patches, feats.shape[1])
        for rows in children:
            active = torch.nonzero(rows >= 0)[:, 0]
            out[active] += feats[rows[active].long()]
        return out if scale is None else out * scale[:, None]
    out = feats.new_empty(num_patches, feats.shape[1])
    call(
        f"patch_sum_{suffix(feats)}", feats.contiguous(), children, scale, out, num_patches, num_slots,
        feats.shape[1], device=feats.device,
    )  # fmt: skip
    return out


@define_op("patch_copy", ROWS_SCHEMA)
def patch_copy(
    feats: Tensor, children: Tensor, parents: Tensor, scale: Tensor | None, backend: str
) -> Tensor:
    """scale[m] · feats[m] with m = parents[n]: [M, C] -> [N, C]."""
    if feats.dtype in HALF_TYPES:
        return patch_copy(feats.float(), children, parents, scale, backend).to(feats.dtype)
    if backend == "reference":
        scaled = feats if scale is None else feats * scale[:, None]
        return scaled[parents.long()]
    out = feats.new_empty(len(parents), feats.shape[1])
    call(
        f"patch_copy_{suffix(feats)}", feats.contiguous(), parents, scale, out, len(parents), feats.shape[1],
        device=feats.device,
    )  # fmt: skip
    return out


@torch.library.register_fake("diff2to3::patch_sum")
def _(feats: Tensor, children: Tensor, parents: Tensor, scale: Tensor | None, backend: str) -> Tensor:
    return feats.new_empty(children.shape[1], feats.shape[1])


@torch.library.register_fake("diff2to3::patch_copy")
def _(feats: Tensor, children: Tensor, parents: Tensor, scale: Tensor | None, backend: str) -> Tensor:
    return feats.new_empty(parents.shape[0], feats.shape[1])


def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, children, parents, scale, ctx.backend = inputs
    ctx.save_for_backward(children, parents, scale)


def backward_of_sum(ctx, v_out):  # type: ignore[no-untyped-def]
    return patch_copy(v_out, *ctx.saved_tensors, ctx.backend), None, None, None, None


def backward_of_copy(ctx, v_out):  # type: ignore[no-untyped-def]
    return patch_sum(v_out, *ctx.saved_tensors, ctx.backend), None, None, None, None


torch.library.register_autograd("diff2to3::patch_sum", backward_of_sum, setup_context=setup_context)
torch.library.register_autograd("diff2to3::patch_copy", backward_of_copy, setup_context=setup_context)


def suffix(tensor: Tensor) -> str:
    """Ending of the C functions for a dtype."""
    return {torch.float32: "f32", torch.float64: "f64"}[tensor.dtype]
