"""Compiles the kernels. Used by setup.py (CPU part) and at first use (either part, into a per-user cache).

Imports only the standard library, because setup.py loads it where torch is not installed.

The result is a set of plain shared libraries with a C interface:

    _lib/cpu_baseline.so   runs everywhere; also reports what the CPU can do
    _lib/cpu_avx2.so       the same sources compiled for AVX2 + FMA        (x86-64)
    _lib/cpu_avx512.so     the same sources compiled for AVX-512           (x86-64)
    cuda_sm90.so           the CUDA sources, for one compute capability

    python -m diff2to3.kernels.build          rebuild the CPU part in place
    python -m diff2to3.kernels.build --cuda   compile the CUDA part for every architecture nvcc offers, and check
                                              that there are no warnings and no spills where none are allowed
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"

#: Never -ffast-math: it lets the compiler reorder the range reduction of the vector exponential.
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = (80, 90, 100, 120)

#: Kernels that must keep everything in registers (DESIGN: the blending kernels at degree 0).
NO_SPILL_KERNELS = re.compile(r"blend_(forward|backward)")


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message carries its output."""


def cpu_variants() -> dict[str, list[str]]:
    """Instruction-set variants to compile on this machine: name -> compiler flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
        avx512 = [*avx2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
        return {"baseline": [], "avx2": avx2, "avx512": avx512}
    return {"baseline": []}  # on 64-bit Arm the baseline already is NEON


def library_suffix() -> str:
    return {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def find_compiler() -> str:
    """The system's C++ compiler: ``c++``, ``g++`` or ``clang++``, whichever is found first."""
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler found (looked for c++, g++, clang++); on Debian or Ubuntu: apt install g++")


def find_nvcc() -> str:
    """nvcc from PATH or the usual place."""
    for path in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and Path(path).exists():
            return path
    raise BuildError("nvcc not found; install the CUDA toolkit and put its bin folder on PATH")


def source_hash() -> str:
    """Fingerprint of every source file, so that a cache never serves a library of other sources."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(SOURCES.rglob("*"))]:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """Where first-use builds go; one folder per source fingerprint and platform."""
    base = Path.home() / (".cache" if sys.platform != "win32" else "AppData/Local")
    return base / "diff2to3" / f"kernels-{source_hash()}-{platform.machine()}"


def run(command: Sequence[str]) -> str:
    """Run a compiler; returns what it printed. Raises BuildError with that output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{output}")
    return output


def compile_variant(compiler: str, variant: str, flags: Sequence[str], out_dir: Path) -> Path:
    """Compile all CPU sources for one instruction set and move the library into place in one step."""
    target = out_dir / f"cpu_{variant}{library_suffix()}"
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        objects = []
        for source in sorted((SOURCES / "cpu").glob("*.cpp")):
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            command = [compiler, *CPU_FLAGS, *flags, f"-I{SOURCES}", "-c", str(source), "-o", objects[-1]]
            warnings = run(command)
            if warnings:
                print(warnings, file=sys.stderr)
        library = Path(scratch) / target.name
        run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])
        os.replace(library, target)
    return target


def build_cpu(out_dir: Path, variants: Sequence[str] | None = None) -> list[Path]:
    """Compile the CPU kernels into ``out_dir``, one library per instruction set."""
    compiler = find_compiler()
    out_dir.mkdir(parents=True, exist_ok=True)
    wanted = {name: f for name, f in cpu_variants().items() if variants is None or name in variants}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [pool.submit(compile_variant, compiler, name, flags, out_dir) for name, flags in wanted.items()]
        built = [job.result() for job in jobs]
    # Written last: a build folder without it is incomplete and is not used.
    (out_dir / "source_hash").write_text(source_hash())
    return built


def compile_cuda(out_dir: Path, archs: Sequence[int], extra: Sequence[str] = ()) -> tuple[Path, str]:
    """Compile the CUDA kernels for compute capabilities such as 80 or 90; returns the library and nvcc's output."""
    nvcc = find_nvcc()
    out_dir.mkdir(parents=True, exist_ok=True)
    target = out_dir / f"cuda_{'_'.join(f'sm{a}' for a in archs)}{library_suffix()}"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    sources = [str(path) for path in sorted((SOURCES / "cuda").glob("*.cu"))]
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        library = Path(scratch) / target.name
        threads = ["--threads=0"]
        output = run([nvcc, *CUDA_FLAGS, *extra, *threads, *codes, f"-I{SOURCES}", "-shared", *sources, "-o", str(library)])
        os.replace(library, target)
    return target, output


def check_cuda(archs: Sequence[int] = CUDA_ARCHS) -> list[str]:
    """Compile the CUDA part with every warning on; returns what is wrong: warnings, and spills where forbidden."""
    known = run([find_nvcc(), "--list-gpu-code"])
    archs = [a for a in archs if f"sm_{a}" in known]
    with tempfile.TemporaryDirectory() as scratch:
        extra = ["-Xptxas=-v", "-Xcompiler=-Wall,-Wextra", "--display-error-number"]
        _, output = compile_cuda(Path(scratch), archs, extra)
    problems = [line for line in output.splitlines() if "warning" in line.lower()]
    kernel = ""
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = f"{found[1]} ({found[2]})"
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spill and (int(spill[1]) or int(spill[2])) and NO_SPILL_KERNELS.search(kernel):
            problems.append(f"{kernel}: {line.strip()}")
    print(f"CUDA kernels compiled for {', '.join(f'sm_{a}' for a in archs)}: {len(problems)} problems")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diff2to3.kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA part for every architecture and check it")
    args = parser.parse_args()
    try:
        if args.cuda:
            problems = check_cuda()
            print("\n".join(problems))
            return 1 if problems else 0
        for path in build_cpu(Path(__file__).resolve().parent / "_lib"):
            print(path)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
