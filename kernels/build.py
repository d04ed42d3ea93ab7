"""Compiles the kernels: for setup.py, and where that found no compiler, at first use into a per-user cache.

Imports only the standard library, because setup.py loads it where torch is not installed.

A *part* is what is compiled and loaded together, into a folder of its own:

    cpu/         cpu_baseline.so   runs everywhere; also reports what the CPU can do
                 cpu_avx2.so       the same sources compiled for AVX2 + FMA        (x86-64)
                 cpu_avx512.so     the same sources compiled for AVX-512           (x86-64)
    cuda_sm90/   cuda.so           the CUDA sources, for one compute capability

A folder appears under its name only when it is complete, and its ``manifest.json`` says which sources it was
compiled from, so a half-written, outdated or damaged folder is never used.

    python -m diff2to3.kernels.build          rebuild the CPU part in place
    python -m diff2to3.kernels.build --check  compile both parts with every warning on; the CUDA part for
                                              every architecture, without spills where none are allowed
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"

#: Never -ffast-math: it lets the compiler reorder the range reduction of the vector exponential.
CPU_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
#: Compute capabilities that --check compiles for: A100, H100/H200, B200, RTX 50.
CUDA_ARCHS = (80, 90, 100, 120)

#: Kernels that must keep everything in registers (the blending kernels at degree 0).
NO_SPILL_KERNELS = re.compile(r"blend_(forward|backward)_kernelILi[134]E")


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message carries its output."""


# ---- compilers and flags ----


def cpu_variants() -> dict[str, list[str]]:
    """Instruction-set variants to compile on this machine: name -> compiler flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
        avx512 = [*avx2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
        # The baseline serves machines without AVX2; -O2 keeps the widest code there is from taking the longest.
        return {"baseline": ["-O2"], "avx2": avx2, "avx512": avx512}
    return {"baseline": []}  # on 64-bit Arm the baseline already is NEON


def library_suffix() -> str:
    return {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def find_compiler() -> str:
    """The system's C++ compiler: ``c++``, ``g++`` or ``clang++``, whichever is found first."""
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler found (looked for c++, g++, clang++); add one with: {compiler_hint()}")


def compiler_hint() -> str:
    """The one line that adds a C++ compiler."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        return "winget install LLVM.LLVM"
    return "apt install g++   (or the g++ package of your distribution)"


def find_nvcc() -> str:
    """nvcc from PATH, from the toolkit's usual folder, or from NVIDIA's packages on PyPI."""
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *pip_nvcc()]
    for path in candidates:
        if path and Path(path).exists():
            return path
    raise BuildError(f"nvcc not found; add it with: {nvcc_hint()}")


def pip_nvcc() -> Iterator[str]:
    """Where the wheels nvidia-cuda-nvcc etc. put the compiler."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        yield from sorted((str(path) for path in Path(folder).glob("cu*/bin/nvcc")), reverse=True)


def nvcc_hint() -> str:
    """The one line that adds nvcc."""
    return 'pip install "diff2to3[nvcc]"'


def run(command: Sequence[str]) -> str:
    """Run a compiler; returns what it printed. Raises BuildError with that output if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{output}")
    return output


def version_of(compiler: str) -> str:
    """The line of ``compiler --version`` that has the number."""
    try:
        lines = run([compiler, "--version"]).splitlines()
    except (BuildError, OSError):
        return "unknown version"
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown version")


#: The quota of a container: "max 100000" or "200000 100000" (microseconds of CPU time in each period).
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cpus(quota: Path = CPU_QUOTA) -> int:
    """CPUs that this process may run on, and, in a container, is granted. The only place that counts them."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    try:
        granted, period = quota.read_text().split()
        return max(1, min(count, math.ceil(int(granted) / int(period))))
    except (OSError, ValueError):  # no container, or no limit
        return count


# ---- folders of compiled libraries ----


@functools.cache
def source_hash(part: str) -> str:
    """Fingerprint of the sources and flags of one part, so that no folder ever serves other sources."""
    kind = part.split("_")[0]
    files = [
        *SOURCES.glob("*.h"),
        *(p for p in (SOURCES / kind).glob("*") if p.suffix in (".h", ".cpp", ".cu")),
    ]
    flags = [CPU_FLAGS, cpu_variants()] if kind == "cpu" else [CUDA_FLAGS]
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(files):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def is_current(folder: Path, part: str) -> bool:
    """Whether ``folder`` holds a finished build of exactly these sources, every file at its full size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, int] = manifest["files"]
        return bool(
            manifest["sources"] == source_hash(part)
            and files
            and all((folder / name).stat().st_size == size for name, size in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def new_folder(folder: Path, part: str, compiler: str) -> Iterator[Path]:
    """A scratch folder that takes the name ``folder`` if the block ends well, and otherwise leaves no trace.

    What stood at ``folder`` is replaced. If another process puts the same build there first, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        yield fresh
        files = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
        manifest = {"sources": source_hash(part), "compiler": version_of(compiler), "files": files}
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for attempt in range(3):
            try:
                if folder.exists():
                    os.rename(folder, Path(scratch) / f"old{attempt}")
                os.rename(fresh, folder)
                return
            except OSError:
                if is_current(folder, part):
                    return
        raise BuildError(f"cannot put the compiled libraries at {folder}")


# ---- compiling ----


def compile_objects(jobs: Sequence[tuple[Sequence[str], Path]]) -> str:
    """Run (command, output) pairs in parallel, each adding ``-o output``; returns everything they printed."""
    with ThreadPoolExecutor(max_workers=available_cpus()) as pool:
        pending = [pool.submit(run, [*command, "-o", str(output)]) for command, output in jobs]
        try:
            return "".join(job.result() for job in pending)
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise


def build_cpu(folder: Path, compiler: str | None = None, extra: Sequence[str] = ()) -> str:
    """Compile the CPU kernels into ``folder``, one library per instruction set; returns warnings."""
    compiler = compiler or find_compiler()
    sources = sorted(
        (SOURCES / "cpu").glob("*.cpp"), key=lambda path: -path.stat().st_size
    )  # long jobs first
    position_independent = [] if sys.platform == "win32" else ["-fPIC", "-pthread"]
    flags = [*CPU_FLAGS, *position_independent, *extra, f"-I{SOURCES}"]
    link = [compiler, "-shared", *extra]
    # A MinGW library must not depend on DLLs that only that compiler's folder has.
    link += ["-static"] if sys.platform == "win32" and "clang" not in Path(compiler).name else []
    with new_folder(folder, "cpu", compiler) as fresh, tempfile.TemporaryDirectory() as scratch:
        objects = {
            name: [Path(scratch) / f"{name}_{source.stem}.o" for source in sources] for name in cpu_variants()
        }
        jobs = [
            ([compiler, *flags, *variant_flags, "-c", str(source)], objects[name][i])
            for i, source in enumerate(sources)
            for name, variant_flags in cpu_variants().items()
        ]
        warnings = compile_objects(jobs)
        for name, parts in objects.items():
            library = fresh / f"cpu_{name}{library_suffix()}"
            run(
                [*link, *(["-pthread"] if position_independent else []), *map(str, parts), "-o", str(library)]
            )
    return warnings


def build_cuda(folder: Path, capability: int, nvcc: str | None = None, extra: Sequence[str] = ()) -> str:
    """Compile the CUDA kernels for one compute capability, 90 for example; returns what nvcc printed."""
    nvcc = nvcc or find_nvcc()
    with new_folder(folder, f"cuda_sm{capability}", nvcc) as fresh:
        return compile_cuda(fresh / f"cuda{library_suffix()}", code_flags(nvcc, [capability]), nvcc, extra)


def compile_cuda(library: Path, codes: Sequence[str], nvcc: str, extra: Sequence[str] = ()) -> str:
    """Compile every CUDA source for the given ``-gencode`` flags into one shared library."""
    flags = [*CUDA_FLAGS, *extra, *codes, f"-I{SOURCES}"]
    with tempfile.TemporaryDirectory() as scratch:
        sources = sorted((SOURCES / "cuda").glob("*.cu"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = [
            ([nvcc, *flags, "-c", str(source)], output)
            for source, output in zip(sources, objects, strict=True)
        ]
        output = compile_objects(jobs)
        return output + run([nvcc, *codes, "-shared", *map(str, objects), "-o", str(library)])


def code_flags(nvcc: str, capabilities: Sequence[int]) -> list[str]:
    """``-gencode`` flags. A GPU newer than ``nvcc`` gets the newest PTX it knows; the driver translates."""
    known = sorted(
        int(number) for number in re.findall(r"^sm_(\d+)$", run([nvcc, "--list-gpu-code"]), re.MULTILINE)
    )
    flags = []
    for wanted in capabilities:
        older = [arch for arch in known if arch <= wanted]
        if not older:
            raise BuildError(f"{nvcc} no longer compiles for sm_{wanted}; an older CUDA toolkit does")
        kind = "sm" if older[-1] == wanted else "compute"
        flags.append(f"-gencode=arch=compute_{older[-1]},code={kind}_{older[-1]}")
    return flags


# ---- checks and the command ----


def check_cuda(capabilities: Sequence[int] = CUDA_ARCHS) -> list[str]:
    """Compile the CUDA part with every warning on; returns warnings, and spills where none are allowed."""
    nvcc = find_nvcc()
    known = run([nvcc, "--list-gpu-code"]).split()
    archs = [arch for arch in capabilities if f"sm_{arch}" in known]
    extra = [
        "-Xptxas=-v",
        "-Xcompiler=-Wall,-Wextra",
        "--display-error-number",
        "-Wno-deprecated-gpu-targets",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        output = compile_cuda(Path(scratch) / f"cuda{library_suffix()}", code_flags(nvcc, archs), nvcc, extra)
    names = ", ".join(f"sm_{arch}" for arch in archs)
    problems = cuda_problems(output)
    print(f"CUDA part: {version_of(nvcc)}, {names}: {len(problems)} problems")
    return problems


def cuda_problems(output: str) -> list[str]:
    """Warnings in nvcc's output, and spills in the kernels that must not have any."""
    problems, kernel = [], "?"
    for line in output.splitlines():
        if "warning" in line.lower():
            problems.append(line.strip())
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = f"{found[1]} ({found[2]})"
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spill and (int(spill[1]) or int(spill[2])) and NO_SPILL_KERNELS.search(kernel):
            problems.append(f"{kernel}: {line.strip()}")
    return problems


def check_cpu() -> list[str]:
    """Compile the CPU part with every warning on; returns the warnings."""
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        output = build_cpu(Path(scratch) / "cpu", compiler, ["-Wextra"])
    problems = [line.strip() for line in output.splitlines() if "warning:" in line]
    print(f"CPU part: {version_of(compiler)}, {', '.join(cpu_variants())}: {len(problems)} problems")
    return problems


def check(parts: Sequence[Callable[[], list[str]]]) -> int:
    problems = [problem for part in parts for problem in part()]
    print("\n".join(problems))
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m diff2to3.kernels.build", description="Compile the kernels."
    )
    parser.add_argument(
        "--check", action="store_true", help="only check for warnings and spills; keep nothing"
    )
    parser.add_argument("--no-cuda", action="store_true", help="with --check: leave the CUDA part out")
    args = parser.parse_args(argv)
    try:
        if args.check:
            return check([check_cpu] if args.no_cuda else [check_cpu, check_cuda])
        folder = Path(__file__).resolve().parent / "_lib" / "cpu"
        print(build_cpu(folder), end="")
        print(folder)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
