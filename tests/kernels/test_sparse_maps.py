"""Neighbour tables and patch plans: against a dictionary of coordinates, on every backend; and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diff2to3.kernels.neighbors import MAX_BATCH, MAX_COORD, NeighborPlan, kernel_offsets, neighbor_plan
from diff2to3.kernels.patchify import PatchPlan, patch_plan

BACKENDS = ("native", "reference")
backends = pytest.mark.parametrize("backend", BACKENDS)
plans = pytest.mark.parametrize("make_plan", [neighbor_plan, patch_plan])


def expected_table(coords: Tensor, kernel: int | str) -> Tensor:
    """Neighbours looked up one by one."""
    rows = {tuple(voxel): row for row, voxel in enumerate(coords.tolist())}
    table = [
        [rows.get((b, x + dx, y + dy, z + dz), -1) for b, x, y, z in coords.tolist()]
        for dx, dy, dz in kernel_offsets(kernel)
    ]
    return torch.tensor(table, dtype=torch.int32).reshape(len(table), len(coords))


def check_patch_plan(plan: PatchPlan, coords: Tensor, size: int) -> None:
    """Every voxel is where the plan says, and patches are all there are, in order."""
    wanted = sorted({(b, x // size, y // size, z // size) for b, x, y, z in coords.tolist()})
    assert [tuple(c) for c in plan.coords.tolist()] == wanted
    counts = [0] * len(wanted)
    for row, (b, x, y, z) in enumerate(coords.tolist()):
        parent = wanted.index((b, x // size, y // size, z // size))
        slot = (x % size * size + y % size) * size + z % size
        assert (int(plan.parents[row]), int(plan.slots[row])) == (parent, slot)
        assert int(plan.children[slot, parent]) == row
        counts[parent] += 1
    assert plan.counts.tolist() == counts
    assert int((plan.children >= 0).sum()) == len(coords)


@st.composite
def voxel_sets(draw: st.DrawFn) -> Tensor:
    """Distinct voxels in any order, from dense blocks to single voxels at the limits."""
    side = draw(st.sampled_from([1, 2, 3, 5, 9, 100]))
    start = draw(st.sampled_from([0, 7, 255, MAX_COORD - 100]))
    batch = draw(st.sampled_from([0, 3, MAX_BATCH - 2]))
    axis = st.integers(start, min(start + side, MAX_COORD) - 1)
    voxels = draw(
        st.lists(st.tuples(st.integers(batch, batch + 1), axis, axis, axis), max_size=60, unique=True)
    )
    return torch.tensor(voxels, dtype=torch.int32).reshape(-1, 4)


@given(coords=voxel_sets(), kernel=st.sampled_from([1, 3, 5, "cross"]))
@settings(max_examples=50, deadline=None)
def test_neighbors_are_those_of_a_lookup(coords: Tensor, kernel: int | str) -> None:
    wanted = expected_table(coords, kernel)
    for backend in BACKENDS:
        assert torch.equal(neighbor_plan(coords, kernel, backend=backend).table, wanted), backend


@given(coords=voxel_sets(), size=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_patches_are_those_of_a_lookup(coords: Tensor, size: int) -> None:
    for backend in BACKENDS:
        check_patch_plan(patch_plan(coords, size, backend=backend), coords, size)


@pytest.mark.parametrize("shuffled", [False, True])
def test_many_voxels_on_several_threads(
    shuffled: bool, two_threads: None, generator: torch.Generator
) -> None:
    """Enough voxels that sorting and merging are cut into pieces."""
    coords = torch.nonzero(torch.rand(2, 40, 40, 40, generator=generator) < 0.3).int()
    if shuffled:
        coords = coords[torch.randperm(len(coords), generator=generator)]
    assert len(coords) > 30_000
    ours, reference = (neighbor_plan(coords, backend=b) for b in BACKENDS)
    assert torch.equal(ours.table, reference.table)
    ours, reference = (patch_plan(coords, backend=b) for b in BACKENDS)
    for name in ("coords", "children", "parents", "slots", "counts"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name
    torch.set_num_threads(1)
    assert torch.equal(neighbor_plan(coords, backend="native").table, neighbor_plan(coords).table)


def test_opposite_taps_are_inverse(generator: torch.Generator) -> None:
    """Tap K - 1 - k read at a neighbour leads back, and the middle tap is the voxel itself."""
    coords = torch.nonzero(torch.rand(1, 6, 6, 6, generator=generator) < 0.5).int()
    for kernel in (3, 5, "cross"):
        plan = neighbor_plan(coords, kernel)
        rows = torch.arange(len(coords), dtype=torch.int32)
        assert torch.equal(plan.table[plan.num_taps // 2], rows)
        for k in range(plan.num_taps):
            active = plan.table[k] >= 0
            there = plan.table[k][active].long()
            assert torch.equal(plan.table[-1 - k][there], rows[active])


def test_offsets_of_kernels() -> None:
    assert kernel_offsets(3) == tuple(itertools.product((-1, 0, 1), repeat=3))
    assert kernel_offsets("cross") == (
        (-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0),
    )  # fmt: skip


@backends
def test_the_ends_of_the_range_are_no_neighbors(backend: str) -> None:
    """A key's fields must not run into each other: (0, MAX - 1) and (1, 0) are far apart."""
    last = MAX_COORD - 1
    corners = [(b, *c) for b in (0, 1, MAX_BATCH - 1) for c in itertools.product((0, last), repeat=3)]
    coords = torch.tensor(corners, dtype=torch.int32)
    table = neighbor_plan(coords, 15, backend=backend).table
    assert int((table >= 0).sum()) == len(coords)


@backends
def test_no_voxels(backend: str) -> None:
    coords = torch.zeros(0, 4, dtype=torch.int32)
    neighbor, patch = neighbor_plan(coords, backend=backend), patch_plan(coords, backend=backend)
    assert neighbor.table.shape == (27, 0)
    assert patch.coords.shape == (0, 4) and patch.children.shape == (8, 0) and patch.parents.shape == (0,)


def test_plans_move_and_are_frozen() -> None:
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], dtype=torch.int32)
    for plan in (neighbor_plan(coords), patch_plan(coords)):
        moved = plan.to("meta")
        assert type(moved) is type(plan) and moved.coords.device.type == "meta"
        with pytest.raises(AttributeError):
            plan.coords = coords  # type: ignore[misc]


def test_int64_is_accepted(generator: torch.Generator) -> None:
    coords = torch.nonzero(torch.rand(2, 5, 5, 5, generator=generator) < 0.5)
    assert coords.dtype == torch.int64
    assert torch.equal(neighbor_plan(coords).table, neighbor_plan(coords.int()).table)
    assert torch.equal(patch_plan(coords).children, patch_plan(coords.int()).children)


# ---- bad input ----

GOOD = [[0, 1, 1, 1], [0, 1, 1, 2], [1, 0, 0, 0]]


@backends
@plans
@pytest.mark.parametrize(
    "column, value",
    [
        (0, -1), (0, MAX_BATCH), (1, -1), (1, MAX_COORD), (2, -1), (2, 1 << 16), (3, MAX_COORD), (3, -(2**31)),
        (3, 2**31 - 1), (1, 2**32 + 1), (0, 2**40),
    ],
)  # fmt: skip
def test_coordinates_out_of_range(
    make_plan: Callable[..., NeighborPlan | PatchPlan], backend: str, column: int, value: int
) -> None:
    coords = torch.tensor(GOOD)
    coords[1, column] = value
    if abs(value) < 2**31:
        coords = coords.int()
    with pytest.raises(ValueError, match=r"^coords: row 1 is .*batch index must be in \[0, 32768\)"):
        make_plan(coords, backend=backend)


@backends
@plans
def test_duplicates(make_plan: Callable[..., NeighborPlan | PatchPlan], backend: str) -> None:
    coords = torch.tensor([*GOOD, GOOD[1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^coords: row 3 repeats voxel \[0, 1, 1, 2\]"):
        make_plan(coords, backend=backend)


@plans
@pytest.mark.parametrize(
    "coords",
    [
        torch.zeros(3, 3, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1, 4),
        torch.zeros(1, 4, dtype=torch.int16),
        torch.zeros(1, 4, dtype=torch.bool),
    ],
)
def test_wrong_shape_or_dtype(make_plan: Callable[..., NeighborPlan | PatchPlan], coords: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^coords: expected"):
        make_plan(coords)


def test_wrong_settings() -> None:
    coords = torch.tensor(GOOD, dtype=torch.int32)
    for kernel in (0, 2, -1, 17, "star", 3.0):
        with pytest.raises(ValueError, match=r"^kernel: expected"):
            neighbor_plan(coords, kernel)  # type: ignore[arg-type]
    for size in (0, 33, 2.0):
        with pytest.raises(ValueError, match=r"^patch_size: expected"):
            patch_plan(coords, size)  # type: ignore[arg-type]
    for make_plan in (neighbor_plan, patch_plan):
        with pytest.raises(ValueError, match=r"^backend: expected one of"):
            make_plan(coords, backend="fast")
