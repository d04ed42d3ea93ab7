"""Compiling, caching and loading: with a tiny set of sources, so that a build takes a second."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diff2to3.kernels import build, cache, library

KERNELS = Path(library.__file__).parent

TINY_SOURCE = """
#include "portable.h"
D23_EXPORT int64_t d23_cpu_level() { return 0; }
D23_EXPORT int64_t d23_answer(int64_t) { return 42; }
"""

pytestmark = pytest.mark.skipif(
    not any(map(build.shutil.which, ("c++", "g++", "clang++"))), reason="no compiler"
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the kernel package with one tiny source; builds go beside it, caches into tmp_path/cache."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "portable.h").write_text((KERNELS / "csrc" / "portable.h").read_text())
    (folder / "cpu" / "tiny.cpp").write_text(TINY_SOURCE)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "cpu_variants", lambda: {"baseline": []})
    monkeypatch.setattr(cache, "BESIDE", tmp_path / "_lib")
    monkeypatch.setattr(cache, "cache_roots", lambda: [tmp_path / "cache"])
    build.source_hash.cache_clear()
    yield folder
    build.source_hash.cache_clear()


def load() -> ctypes.CDLL | None:
    return library.find_or_build("cpu", library.load_cpu, build.build_cpu)


def answer() -> int:
    found = load()
    assert found is not None
    return found.d23_answer(ctypes.c_int64(1))


def cached(tmp_path: Path) -> Path:
    return cache.cached_folder(tmp_path / "cache", "cpu")


def test_installed_build_is_preferred(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build.build_cpu(tmp_path / "_lib" / "cpu")
    assert answer() == 42
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr().err == ""


def test_first_use_compiles_once(sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert answer() == answer() == 42
    assert capfd.readouterr().err.count("compiling") == 1
    assert build.is_current(cached(tmp_path), "cpu")


def test_outdated_build_is_not_used(sources: Path, tmp_path: Path) -> None:
    build.build_cpu(tmp_path / "_lib" / "cpu")
    (sources / "cpu" / "tiny.cpp").write_text(TINY_SOURCE.replace("42", "43"))
    build.source_hash.cache_clear()
    assert answer() == 43


def test_fingerprint_covers_headers_and_flags(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.source_hash("cpu"), build.source_hash("cuda_sm90")
    (sources / "portable.h").write_text("// changed")
    (sources / "cpu" / "notes.txt~").write_text("an editor's backup is no source")
    build.source_hash.cache_clear()
    after = build.source_hash("cpu"), build.source_hash("cuda_sm90")
    assert before[0] != after[0] and before[1] != after[1]
    monkeypatch.setattr(build, "CPU_FLAGS", [*build.CPU_FLAGS, "-DNEW"])
    build.source_hash.cache_clear()
    assert build.source_hash("cpu") != after[0]
    assert build.source_hash("cuda_sm90") == after[1]


def test_failing_build_leaves_the_old_one_and_no_litter(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "_lib" / "cpu"
    build.build_cpu(folder)
    before = (folder / "manifest.json").read_bytes()
    (sources / "cpu" / "tiny.cpp").write_text("this is no C++")
    with pytest.raises(build.BuildError, match=r"tiny\.cpp"):
        build.build_cpu(folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["cpu"]


def test_rebuild_replaces(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "_lib" / "cpu"
    build.build_cpu(folder)
    (folder / "left_over.so").write_bytes(b"")
    build.build_cpu(folder)
    assert not (folder / "left_over.so").exists()
    assert build.is_current(folder, "cpu")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing library", "no manifest", "bad manifest"])
def test_damaged_cache_is_rebuilt(damage: str, sources: Path, tmp_path: Path) -> None:
    build.build_cpu(cached(tmp_path))
    manifest = cached(tmp_path) / "manifest.json"
    (name,) = json.loads(manifest.read_text())["files"]
    file = cached(tmp_path) / name
    size = file.stat().st_size
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: size // 2])
    elif damage == "garbage":
        file.write_bytes(b"x" * size)
    elif damage == "missing library":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[1, 2")
    assert answer() == 42
    assert build.is_current(cached(tmp_path), "cpu")
    assert file.read_bytes() != b"x" * size


def test_damaged_installation_falls_back_to_the_cache(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build.build_cpu(tmp_path / "_lib" / "cpu")
    file = next((tmp_path / "_lib" / "cpu").glob("cpu_*"))
    file.write_bytes(b"x" * file.stat().st_size)
    assert answer() == 42
    assert build.is_current(cached(tmp_path), "cpu")
    assert "cannot be loaded" in capfd.readouterr().err


def test_unwritable_home_uses_the_next_folder(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a file where the home should be")
    monkeypatch.setattr(cache, "cache_roots", lambda: [tmp_path / "file" / "x", tmp_path / "second"])
    assert answer() == 42
    assert build.is_current(cache.cached_folder(tmp_path / "second", "cpu"), "cpu")


def test_nowhere_to_write_runs_the_reference(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "cache_roots", lambda: [tmp_path / "file" / "x"])
    assert load() is None
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "reference" in lines[0] and str(tmp_path / "file") in lines[0]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_folder_that_others_can_write_is_refused(sources: Path, tmp_path: Path) -> None:
    build.build_cpu(cached(tmp_path))
    (tmp_path / "cache").chmod(0o777)
    assert list(cache.existing("cpu")) == []
    with pytest.raises(OSError, match="other users"):
        cache.writable_root()


def test_missing_compiler_runs_the_reference(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert load() is None
    error = capfd.readouterr().err
    assert "no C++ compiler found" in error and build.compiler_hint() in error


def test_compiler_error_is_one_line(sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sources / "cpu" / "tiny.cpp").write_text("int f() { return undeclared_name; }")
    assert load() is None
    lines = [line for line in capfd.readouterr().err.splitlines() if "compiling" not in line]
    assert len(lines) == 1 and "undeclared_name" in lines[0]


#: Compiles as library.py does, without importing torch, so that two processes really meet.
RACE = """
import sys, types
package = types.ModuleType("kernels"); package.__path__ = [sys.argv[1]]; sys.modules["kernels"] = package
from pathlib import Path
from kernels import build, cache
build.SOURCES = Path(sys.argv[2]); build.cpu_variants = lambda: {"baseline": []}
cache.cache_roots = lambda: [Path(sys.argv[3])]
if sys.argv[4] == "no lock":
    from contextlib import nullcontext
    cache.exclusive = lambda path: nullcontext()
folder = cache.compile_once("cpu", build.build_cpu, set())
assert build.is_current(folder, "cpu")
"""


@pytest.mark.parametrize("lock", ["lock", "no lock"])
def test_processes_that_start_together(lock: str, sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(KERNELS), str(sources), str(tmp_path / "cache"), lock]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    if lock == "lock":
        assert sum(error.count("compiling") for error in errors) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_code_flags_fall_back_to_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "run", lambda command: "sm_75\nsm_80\nsm_90\n")
    assert build.code_flags("nvcc", [80]) == ["-gencode=arch=compute_80,code=sm_80"]
    assert build.code_flags("nvcc", [100]) == ["-gencode=arch=compute_90,code=compute_90"]
    with pytest.raises(build.BuildError, match="sm_70"):
        build.code_flags("nvcc", [70])


def test_cuda_warnings_and_spills_are_found() -> None:
    output = """
ptxas info    : Compiling entry function '_Z20blend_forward_kernelILi3EEvv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z21blend_backward_kernelILi3EEvv' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z6sortedv' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
a.cu(3): warning #177-D: variable "x" was declared but never referenced
"""
    problems = build.cuda_problems(output)
    assert len(problems) == 2
    assert "blend_backward" in problems[0] and "177-D" in problems[1]


def test_unknown_and_missing_backends_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, float32 = torch.device("cpu"), torch.float32
    with pytest.raises(ValueError, match="fast"):
        library.resolve_backend("fast", cpu, float32)
    monkeypatch.setattr(library, "cpu_library", lambda: None)
    assert library.resolve_backend("auto", cpu, float32) == "reference"
    with pytest.raises(RuntimeError, match="doctor"):
        library.resolve_backend("native", cpu, float32)
    with pytest.raises(library.KernelError, match="answer"):
        library.call("answer", device=cpu)


def test_call_checks_its_tensors(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cpu = load(), torch.device("cpu")
    monkeypatch.setattr(library, "cpu_library", lambda: found)
    assert library.call("answer", device=cpu) == 42
    with pytest.raises(library.KernelError, match="contiguous"):
        library.call("answer", torch.zeros(4, 4).T, device=cpu)
    with pytest.raises(library.KernelError, match="meta"):
        library.call("answer", torch.zeros(4, device="meta"), device=cpu)
