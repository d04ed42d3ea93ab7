"""The emulator that runs the CUDA sources on the CPU: its barriers, warp intrinsics, atomics, and what it finds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diff2to3.kernels import build, library

HERE = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(build.shutil.which, ("c++", "g++", "clang++"))),
    reason="the emulator needs Linux and a C++ compiler",
)


def load_emulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulator", HERE / "cuda_emulator" / "emulator.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The self-test's kernels in place of the CUDA kernels."""
    emulator = load_emulator()
    folder = tmp_path_factory.mktemp("selftest")
    sources = [HERE / "cuda_emulator" / "selftest.cu", build.SOURCES / "cuda" / "launch.cu"]
    file = emulator.compile_emulated(folder, sources, ["-Wall", "-Werror"])
    with pytest.MonkeyPatch.context() as patch:
        emulator.install(file, patch)
        yield emulator


@pytest.fixture(params=[0, 1, 2])
def order(emulated: ModuleType, request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs threads in ascending order, and in two random ones."""
    emulated.call("emulator_seed", request.param)
    yield request.param
    emulated.call("emulator_seed", 0)


@pytest.mark.parametrize("n", [1, 95, 96, 97, 500])
def test_barriers_and_shared_memory(emulated: ModuleType, order: int, n: int) -> None:
    values = torch.arange(1.0, n + 1)
    blocks = -(-n // 96)
    sums, counts = torch.full((blocks,), -1.0), torch.zeros(blocks, dtype=torch.int32)
    emulated.call("test_block_sum", values, sums, counts, n)
    padded = torch.nn.functional.pad(values, (0, blocks * 96 - n)).reshape(blocks, 96)
    assert torch.equal(sums, padded.sum(1))
    inside = (padded > 0).sum(1)
    assert torch.equal(counts.long(), inside + 1000 + 10000 * (inside == 96))


def expected_warp_results(values: list[int], first: int, lanes: int) -> list[list[int]]:
    """What each intrinsic of the self-test gives, computed lane by lane."""
    v = values[first : first + lanes]
    inside = range(lanes)
    down = [i + 1 if i % 4 < 3 and i + 1 < lanes else i for i in inside]
    half = [sum(1 << j for j in inside if j // 16 == i // 16 and j != 17) for i in inside]
    return [
        [v[3]] * lanes,
        [v[i ^ 1] for i in inside],
        [v[i - 2] if i >= 2 else v[i] for i in inside],
        [v[down[i]] for i in inside],
        [sum(1 << j for j in inside if v[j] % 2)] * lanes,
        [int(5 in v)] * lanes,
        [int(min(v) >= 0)] * lanes,
        [sum(1 << j for j in inside if v[j] % 3 == v[i] % 3) for i in inside],
        [v[4]] * lanes,
        [0 if i == 17 else half[i] for i in inside],
    ]


def test_warp_intrinsics(emulated: ModuleType, order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    values = torch.randint(0, 9, (64,), generator=generator, dtype=torch.int32)
    out = torch.zeros(10, 64, dtype=torch.int32)
    emulated.call("test_warp", values, out)
    for first, lanes in ((0, 32), (32, 20)):
        for row, expected in enumerate(expected_warp_results(values.tolist(), first, lanes)):
            found = [x & 0xFFFFFFFF for x in out[row, first : first + lanes].tolist()]
            assert found == expected, f"row {row}, lanes from {first}"
    assert not out[:, 52:].any()


def test_atomics(emulated: ModuleType, order: int) -> None:
    n = 500
    values = torch.randperm(n, generator=torch.Generator().manual_seed(order)).to(torch.int32)
    total, smallest, largest = (torch.tensor([x], dtype=torch.int32) for x in (0, 9999, -1))
    bits, slots = torch.zeros(1, dtype=torch.int64), torch.full((n,), -1, dtype=torch.int32)
    emulated.call("test_atomics", values, n, total, smallest, largest, bits, slots)
    assert (int(total), int(smallest), int(largest)) == (n * (n - 1) // 2, 0, n - 1)
    assert int(bits) == -1  # all 64 bits
    assert torch.equal(slots.sort().values, torch.arange(n, dtype=torch.int32))


@pytest.mark.parametrize(
    ("n", "begin", "end"), [(0, 0, 64), (1, 0, 64), (1000, 0, 64), (1000, 8, 16), (1000, 0, 3)]
)
def test_sort_and_scan(emulated: ModuleType, n: int, begin: int, end: int) -> None:
    generator = torch.Generator().manual_seed(n)
    keys = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    values = torch.arange(n, dtype=torch.int32)
    out_keys, out_values, sums = torch.empty_like(keys), torch.empty_like(values), torch.empty_like(values)
    space = library.scratch("test_sort", n, device=torch.device("cpu"))
    emulated.call("test_sort", keys, values, out_keys, out_values, sums, n, begin, end, space)
    part = keys if end - begin == 64 else (keys >> begin) & ((1 << (end - begin)) - 1)
    order = torch.sort(part, stable=True).indices
    assert torch.equal(out_values.long(), order) and torch.equal(out_keys, keys[order])
    assert torch.equal(sums.long(), torch.cumsum(order, 0) - order)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "skipped_barrier: block (0, 0, 0): deadlock: 63 threads wait at the barrier"),
        (1, "different barriers"),
        (2, "does not name its lane"),
        (5, "grid too large"),
        (6, "block too large"),
        (7, "more shared memory"),
    ],
)
def test_faults_are_found(emulated: ModuleType, order: int, which: int, message: str) -> None:
    with pytest.raises(library.KernelError, match="CUDA error") as error:
        emulated.call("test_fault", which, torch.zeros(64), 64)
    assert message in str(error.value)
    test_barriers_and_shared_memory(emulated, order, 97)  # and the next launch works


def test_empty_launch_is_nothing(emulated: ModuleType) -> None:
    out = torch.ones(32)
    assert emulated.call("test_fault", 8, out, 32) == 0
    assert bool((out == 1).all())


def test_shared_memory_starts_as_nan(emulated: ModuleType) -> None:
    out = torch.zeros(32)
    emulated.call("test_fault", 3, out, 32)
    emulated.call("test_block_sum", torch.ones(96), torch.zeros(1), torch.zeros(1, dtype=torch.int32), 96)
    emulated.call("test_fault", 3, out, 32)
    assert bool(out.isnan().all())


def test_races_change_with_the_order(emulated: ModuleType) -> None:
    results: set[tuple[int, ...]] = set()
    for seed in range(3):
        emulated.call("emulator_seed", seed)
        out = torch.zeros(64, dtype=torch.int32)
        emulated.call("test_fault", 4, out, 64)
        results.add(tuple(out.tolist()))
    emulated.call("emulator_seed", 0)
    assert len(results) == 3
